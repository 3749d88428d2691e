"""
Make the application: Quart with the routes, behind the door, around one kit.
"""

import logging

from quart import Quart

from app.edge import Edge
from app.kit import Kit
from app.routes import routes
from app.run_routes import run_routes
from app.settings import Settings, load


def create_app(settings: Settings | None = None) -> Quart:
    """
    Return a complete ASGI application for one process.

    It starts and stops the kit with the server's lifespan, so it runs under
    any ASGI server; the drain and the hand-off need `python -m app`.
    """
    kit = Kit(settings or load())
    app = Quart("app", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = kit.settings.max_body_bytes
    # Another path is another address: 404, not a redirect.
    app.url_map.merge_slashes = False
    app.logger.handlers = []
    app.logger.propagate = True
    app.logger.setLevel(logging.WARNING)
    app.register_blueprint(routes(kit))
    app.register_blueprint(run_routes(kit))
    app.extensions["sse"] = kit
    app.asgi_app = Edge(app.asgi_app, kit)  # type: ignore[assignment, arg-type]

    @app.before_serving
    async def start() -> None:
        kit.start()

    @app.after_serving
    async def stop() -> None:
        await kit.stop()

    return app
