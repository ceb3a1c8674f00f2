"""Serves a model by HTTP: requests become batches, and processes, one for each device, answer them.

The process of the server reads requests and knows no model (`http`, `dispatch`). A process of a worker restores the
model, decodes the bodies of requests and predicts (`worker`, `responder`, `kinds`), so that an image that crashes a
decoder ends a worker, which starts again, and not the server. Frames on a pair of sockets connect the two (`frames`,
`workers`, `answering`).
"""

from lightkit.app.serving.server import Server, serve
from lightkit.app.serving.settings import ServerSettings

__all__ = ["Server", "ServerSettings", "serve"]
