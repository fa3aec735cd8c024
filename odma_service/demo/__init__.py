"""A demonstration that checks itself: an engine without a model against a real server.

play.py plays one policy; engine.py is the decode loop over load.py (what is asked), running.py
(what runs) and device.py (the memory); report.py shows what came of it.
"""
