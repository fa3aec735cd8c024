"""`odma web`: what it tells, whom it answers, and what a real browser makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.error
import urllib.request

import pytest
from browser import Browser
from servers import open_pool, wait_for

from odma_service.client.local import ODMA
from odma_service.values import Allocate, Extend, PolicyChange, TenantShare, Used

HOSTILE = "<img src=x onerror=alert(1)>"
PHONE, DESKTOP = (390, 844), (1280, 800)


@pytest.fixture
def page(server):
    """Return the address of a page of the shared server."""
    command = [*ODMA, "web", "--port", "0", "--target", server.target]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield process.stdout.readline().removeprefix("the page: ").strip()
    finally:
        process.terminate()
        process.communicate(timeout=30)


def get(address, **headers):
    asked = urllib.request.Request(address, headers=headers)
    with urllib.request.urlopen(asked, timeout=10) as page:
        return page.headers, page.read().decode()


def test_a_look_has_every_pool_and_the_regions_of_one(page, service, name):
    pool = open_pool(service, name)
    place = pool.apply(ops=[Allocate("r", 100)]).results[0]
    pool.apply(used=[Used(place.handle, 100)])
    _, text = get(f"{page}api/look?pool={name}")
    told = json.loads(text)
    [found] = [one for one in told["pools"] if one["summary"]["pool"]["name"] == name]
    assert found["summary"]["regions"] == 1
    assert told["regions"] == [[place.start_token, place.length_tokens, 100, 1, place.handle]]
    wait_for(
        lambda: "TAKEN_OVER" in get(f"{page}api/look")[1] or _reopen(service, name), "an event"
    )


def _reopen(service, name):
    open_pool(service, name, take_over=True)  # until the page watches too


def test_another_site_gets_nothing_and_nothing_can_be_loaded_from_elsewhere(page):
    with pytest.raises(urllib.error.HTTPError, match="400"):
        get(page, Host="odma.example.com")
    headers, _ = get(page)
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(f"{page}../app.py")


def test_a_service_that_is_gone_is_said_to_be_gone(servers):
    server = servers()
    command = [*ODMA, "web", "--port", "0", "--target", server.target]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = process.stdout.readline().removeprefix("the page: ").strip()
        server.kill()
        with pytest.raises(urllib.error.HTTPError, match="503") as refused:
            get(f"{address}api/look")
        assert "UNAVAILABLE" in json.load(refused.value)["error"]
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.fixture(scope="module")
def browser():
    made = Browser()
    yield made
    made.close()


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_a_browser_shows_maps_moves_and_tables(page, browser, service, name, size):
    shares = [TenantShare(HOSTILE[:32], 0.4)]
    policy = PolicyChange(name="odma", limits_tokens=[256, 1024, 4096], tenants=shares)
    pool = open_pool(service, name, policy=policy)
    ops = [Allocate(name, 100, predicted_output_tokens=20) for name in "ab"]
    first, second = pool.apply(ops=ops).results
    pool.apply(used=[Used(first.handle, 60), Used(second.handle, 60)])
    browser.open("about:blank", *size)
    wait_for(lambda: browser.value("location.href") == "about:blank", "an empty page")
    browser.complaints.clear()
    browser.asked.clear()
    browser.open(f"{page}#{name}", *size)

    def text(selector):
        return browser.value(f"document.querySelector({selector!r})?.innerText ?? ''")

    wait_for(lambda: text("#name") == name, "the pool")
    assert text("#target")
    told = browser.value("document.getElementById('map').getAttribute('aria-label')")
    assert told.startswith("2 live regions in 4,096 tokens")
    for table in ("#memory", "#policy", "#buckets", "#counts"):
        assert text(table), table
    assert HOSTILE[:32] in text("#tenants")
    # A region that cannot grow in its place is moved, which the map shows.
    used = [Used(first.handle, first.length_tokens), Used(second.handle, 60)]
    [moved] = pool.apply(used=used, ops=[Extend(first.handle, first.length_tokens + 1)]).results
    assert moved.start_token != first.start_token
    label = "document.getElementById('map').getAttribute('aria-label')"
    wait_for(lambda: "1 moved just now" in browser.value(label), "the move")
    colour = "p.getImageData({}, {}, 1, 1).data.join()"
    free, written = (
        browser.value(
            f"(() => {{ const c = document.getElementById('map'), p = c.getContext('2d');"
            f"return {colour.format(x, y)}; }})()"
        )
        for x, y in (("c.width - 3", "c.height - 4"), ("Math.floor(c.width * 0.65)", "10"))
    )
    assert free != written
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.value(overflow) <= 0
    assert browser.complaints == []
    assert {url for url in browser.asked if not url.startswith(page)} <= {"about:blank"}
