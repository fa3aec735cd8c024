"""A demonstration that checks itself: the replay's loop against a real server.

play.py plays one policy; remote.py is a client's pool as the loop's memory, device.py what lies
behind it; report.py shows what came of it.
"""
