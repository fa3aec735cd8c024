"""A demonstration that checks itself: an engine without a model against a real server.

command.py is `odma demo`; server.py runs the server; play.py plays one policy; engine.py is
the decode loop over load.py (what is asked), running.py (what runs) and device.py (the
memory); report.py shows what came of it. All of it talks to the server through the client.
"""

from odma_service.demo.command import demo_command

__all__ = ["demo_command"]
