"""
The plain page of the recipes, in Chromium, as a site serves it that has copied it.
"""

from functools import partial
from pathlib import Path

from playwright.sync_api import expect

APP = Path(__file__).parents[2] / "app"


def serve(file, route):
    route.fulfill(path=file)


def test_orders_and_an_answer(site, publish, page):
    """
    It shows orders as text, and a run's answer to its end.
    """
    for file in (APP / "recipes" / "orders.html", APP / "static" / "sse-client.js"):
        page.route(f"**/shop/{file.name}", partial(serve, file))
    page.goto(f"{site.url}/shop/orders.html")
    expect(page.get_by_role("status")).to_have_text("open")

    publish(site.url, {"topics": ["orders"], "event": "created", "data": {"id": 7, "customer": "<b>ann"}})
    page.get_by_label("Ask").fill("Hello")
    page.get_by_role("button", name="Send").click()

    expect(page.locator("#orders li")).to_have_text("<b>ann ordered 7")
    expect(page.locator("#answer")).to_contain_text("You wrote 1 words: Hello", timeout=30_000)
