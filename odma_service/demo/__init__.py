"""A demonstration that checks itself: the replay's loop against a real server.

play.py plays one policy; checked.py is a pool as the loop's memory, on the device that device.py
makes up, and remote.py one behind a client; report.py shows what came of it.
"""
