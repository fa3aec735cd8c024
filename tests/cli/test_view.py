"""`odma status` and `odma top` show what is kept and what was reused."""

from __future__ import annotations

import io
import re

from odma_service.cli import top, view
from odma_service.cli.output import SafeConsole
from odma_service.rpc.v1 import pool_service_pb2 as pb


def shown(renderable) -> str:
    console = SafeConsole(file=io.StringIO(), width=120, color_system=None)
    console.print(renderable)
    return console.file.getvalue()


def test_what_is_kept_and_reused_is_shown():
    pool = pb.GetPoolResponse(granule_tokens=64, block_tokens=16, bytes_per_token=128)
    pool.summary.capacity_tokens, pool.summary.free_tokens = 1024, 896
    pool.reuse.kept_tokens, pool.reuse.given_up_tokens = 512, 32
    pool.reuse.prompt_tokens, pool.reuse.reused_tokens = 400, 300
    regions = [
        pb.Region(state=pb.REGION_STATE_LIVE, used_tokens=128),
        pb.Region(state=pb.REGION_STATE_KEPT, awaits_seq=7, shareable_tokens=448),
    ]
    regions[0].place.length_tokens = 128
    regions[1].place.start_token, regions[1].place.length_tokens = 512, 512
    assert view.cells(1024, regions, 8) == ["used", *["free"] * 3, *["kept"] * 4]
    text = shown(view.picture(pool, regions, 80))
    assert re.search(r"kept +│ +512 │ +50.0%", text)
    assert re.search(r"reused +│ +300 │ +75.0%", text)
    assert re.search(r"given up +│ +32 │ +8.0%", text)
    assert "reuse in granules of 64" in text
    listed = shown(view.list_of_regions(regions))
    assert re.search(r"512 +│ +512 +│ +│ +448 +│ +│ +seq 7", listed)
    before = pb.GetPoolResponse()
    assert (top._reused(pool, before), top._reused(pool, pool)) == ("75%", "-")
