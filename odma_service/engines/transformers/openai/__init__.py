"""The HTTP interface that clients of OpenAI speak: chat completions and completions.

asked    what a client may ask, and how it is refused
answers  what it gets, at once or as a stream of events
app      the routes, from a request to the engine and back
"""
