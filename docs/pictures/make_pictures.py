"""Make the pictures of the documentation from the demo, with Chromium: `make pictures` runs it.

The diagrams beside this file are drawn by hand.
"""

from __future__ import annotations

import html
import io
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.support.browser import ARGS
from tests.support.demosite import MANAGE, DemoSite

HERE = Path(__file__).resolve().parent
TOKEN = "42:42:42:42:42:42"  # noqa: S105
SHORT_TOKEN = "orders"  # noqa: S105
COLORS = 128
"""The most colors of a picture, which keeps the files small."""

# The figures of a machine that is not busy making pictures.
FIGURES = """
import math, sys, time, django
django.setup()
from testproject import machine
real = machine.sample()
def sample_at(seconds):
    memory = 58 + 5 * math.sin(seconds / 40)
    return {
        **real,
        "time": round(seconds * 1000),
        "cpu": round(24 + 14 * math.sin(seconds / 7) + 8 * math.sin(seconds / 2.3), 1),
        "load": round(real["cores"] * (0.42 + 0.16 * math.sin(seconds / 19)), 2),
        "memory": round(memory, 1),
        "used": real["total"] * memory / 100,
    }
"""
SERVE = f"""{FIGURES}
from django.core.management import execute_from_command_line
from django_eventsource import publish_many, read_history
if not read_history(machine.MACHINE_TOKEN, limit=1).events:
    times = [time.time() - second for second in range(119, 0, -1)]
    items = [(machine.MACHINE_TOKEN, "sample", sample_at(one)) for one in times]
    publish_many(items, machine.MachineEvent)
machine.sample = lambda: sample_at(time.time())
execute_from_command_line(sys.argv)
"""
SUPERUSER = """
import django
django.setup()
from django.contrib.auth.models import User
User.objects.create_superuser("admin", "", "admin")
"""
TERMINAL = """
<style>
  body { margin: 0; background: transparent }
  #window { background: #16211d; border-radius: 10px; overflow: hidden; width: %(width)spx;
            height: %(height)s; box-sizing: border-box;
            font: 14px/1.65 ui-monospace, "DejaVu Sans Mono", monospace; color: #e7eeea }
  header { background: #24322c; color: #9fb0a8; padding: 7px 14px; font-size: 12px;
           font-family: system-ui, sans-serif }
  header i { display: inline-block; width: 11px; height: 11px; border-radius: 50%%;
             background: #4b5d55; margin-right: 6px; vertical-align: -1px }
  pre { margin: 0; padding: 12px 16px; font: inherit; white-space: pre-wrap }
  b { color: #46c79d; font-weight: 600 } em { color: #9fb0a8; font-style: normal }
</style>
<div id="window"><header><i></i><i></i><i></i> %(title)s</header><pre>%(text)s</pre></div>
"""


class Site(DemoSite):
    """A demo site in a temporary folder, with commands that a reader can type."""

    command = (sys.executable, "-c", SERVE)

    def manage(self, *args: str) -> str:
        """Run a management command to its end, and return what it prints."""
        command = [sys.executable, str(MANAGE), *args]
        done = subprocess.run(command, env=self.env, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout


def save(png: bytes, name: str) -> None:
    """Write a picture with few colors."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.quantize(COLORS, dither=Image.Dither.NONE).save(HERE / name, optimize=True)


def open_live_page(browser: Browser, site: Site, scheme: str, token: str = TOKEN) -> Page:
    """Open the live page of a token, and wait until it listens."""
    page = browser.new_page(
        viewport={"width": 1240, "height": 800},
        device_scale_factor=2,
        color_scheme="dark" if scheme == "dark" else "light",
    )
    page.goto(f"{site.live_url}?token={token}")
    expect(page.locator("#state")).to_have_text("open")
    expect(page.locator("#machine .state")).to_have_text("open")
    page.wait_for_function("document.querySelector('#machine svg').dataset.received > 110")
    return page


def make_demo(browser: Browser, site: Site) -> None:
    """Show the live page with events."""
    pages = {scheme: open_live_page(browser, site, scheme) for scheme in ("light", "dark")}
    for value in ("42", "Door 3 is open", '{"order": 1207, "state": "paid"}'):
        site.manage("send_event", TOKEN, "ping", value)
    pages["light"].get_by_label("Value").fill("Hello")
    pages["light"].get_by_role("button", name="Send").click()
    for scheme, name in (("light", "demo.png"), ("dark", "demo-dark.png")):
        page = pages[scheme]
        expect(page.locator("#log li .data").last).to_have_text("Hello")
        source = page.locator(".source").bounding_box()
        assert source is not None
        save(page.screenshot(clip={"x": 0, "y": 0, "width": 1240, "height": source["y"]}), name)
        page.close()


def open_admin(browser: Browser, site: Site, path: str, height: int) -> Page:
    """Log in, and open a page of the admin."""
    page = browser.new_page(viewport={"width": 1240, "height": height}, device_scale_factor=2)
    page.goto(f"{site.url}admin/login/?next=/admin/django_eventsource/{path}")
    page.fill("#id_username", "admin")
    page.fill("#id_password", "admin")
    page.click("[type=submit]")
    return page


def make_console(browser: Browser, site: Site) -> None:
    """Show the console, which has watched three live pages for some time."""
    watched = [open_live_page(browser, site, "light") for _ in range(3)]
    page = open_admin(browser, site, "console/", 720)
    points = "document.querySelector('[data-chart=delivered] polyline')?.points.length"
    page.wait_for_function(f"{points} > 25", timeout=90_000)
    save(page.screenshot(), "console.png")
    for one in (page, *watched):
        one.close()


def make_admin(browser: Browser, site: Site) -> None:
    """Show the stored events in the admin."""
    page = open_admin(browser, site, "storedevent/?q=42:42", 640)
    expect(page.locator("#result_list tbody tr").first).to_be_visible()
    save(page.screenshot(), "admin.png")
    page.close()


def typed(command: str) -> str:
    """Return a command as a line of a terminal, as HTML."""
    return f"<b>$</b> {html.escape(command)}\n"


def draw_terminal(page: Page, title: str, text: str, width: int, height: str = "auto") -> bytes:
    """Draw the window of a terminal, and return the picture."""
    page.set_content(TERMINAL % {"title": title, "text": text, "width": width, "height": height})
    return page.locator("#window").screenshot(omit_background=True)


def make_listen_events(browser: Browser, site: Site) -> None:
    """Show the real output of the command, next to the commands that publish."""
    listen = ["listen_events", TOKEN, "--rewind", "2", "-P", str(site.port)]
    listening = subprocess.Popen(
        [sys.executable, str(MANAGE), *listen], env=site.env, stdout=subprocess.PIPE, text=True
    )
    assert listening.stdout is not None
    lines = [listening.stdout.readline(), listening.stdout.readline()]
    sent = ""
    for args in (["ping", "Hello from another terminal"], ["close"]):
        quoted = " ".join(f'"{arg}"' if " " in arg else arg for arg in args)
        sent += typed(f"python manage.py send_event {TOKEN} {quoted}")
        sent += html.escape(site.manage("send_event", TOKEN, *args))
    lines += listening.stdout.readlines()
    assert listening.wait() == 0
    left = typed(f"python manage.py listen_events {TOKEN} --rewind 2")
    left += html.escape("".join(lines)) + "<b>$</b>"
    page = browser.new_page(device_scale_factor=2, viewport={"width": 900, "height": 700})
    windows = [
        Image.open(io.BytesIO(draw_terminal(page, title, text, 760)))
        for title, text in (("Terminal 1", left), ("Terminal 2", sent + "<b>$</b>"))
    ]
    save_stack(windows, "listen-events.png")
    page.close()


def save_stack(images: list[Image.Image], name: str) -> None:
    """Write images below each other, on a transparent ground."""
    gap = 24
    height = sum(image.height for image in images) + gap * (len(images) - 1)
    sheet = Image.new("RGBA", (images[0].width, height))
    top = 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height + gap
    sheet.quantize(COLORS, method=Image.Quantize.FASTOCTREE).save(HERE / name, optimize=True)


def make_restart(browser: Browser, site: Site) -> None:
    """Show that a page receives the events that were published while the server was down."""
    page = open_live_page(browser, site, "light", SHORT_TOKEN)
    page.set_viewport_size({"width": 620, "height": 900})
    drawing = browser.new_page(device_scale_factor=2, viewport={"width": 700, "height": 900})
    card = page.locator("section.card", has=page.locator("#token-title"))
    page.add_style_tag(content="#send, details { display: none } .log { height: 13.5rem }")
    height = f"{card.bounding_box()['height']:.0f}px"  # type: ignore[index]
    frames: list[Image.Image] = []  # all have the same size
    durations: list[int] = []
    lines = ""

    def show(milliseconds: int) -> None:
        text = f"{lines}<b>$</b>"
        left = Image.open(io.BytesIO(draw_terminal(drawing, "Terminal", text, 560, height)))
        right = Image.open(io.BytesIO(card.screenshot()))
        frame = Image.new("RGB", (left.width + right.width + 72, right.height + 48), "#f4f6f5")
        frame.paste(left, (24, 24), left.convert("RGBA"))
        frame.paste(right, (left.width + 48, 24))
        frames.append(
            frame.resize((frame.width // 2, frame.height // 2), Image.Resampling.LANCZOS)
        )
        durations.append(milliseconds)

    def send(value: str) -> None:
        nonlocal lines
        lines += typed(f'python manage.py send_event {SHORT_TOKEN} ping "{value}"')
        lines += html.escape(site.manage("send_event", SHORT_TOKEN, "ping", value))

    values = page.locator("#log li .data")
    show(1200)
    send("Order 1 is paid")
    expect(values).to_have_text(["Order 1 is paid"])
    show(1800)
    site.stop(signal.SIGTERM)
    lines += "<em># The server is stopped.</em>\n"
    expect(page.locator("#state")).to_have_text("reconnecting")
    show(1800)
    send("Order 2 is paid")
    show(1200)
    send("Order 3 is paid")
    show(1800)
    assert values.count() == 1
    site.start()
    lines += "<em># The server is started again.</em>\n"
    show(1200)
    expect(values).to_have_text([f"Order {n} is paid" for n in (1, 2, 3)])
    expect(page.locator("#state")).to_have_text("open")
    lines += "<em># The page has received both.</em>\n"
    show(4000)
    width, frame_height = frames[0].size
    sheet = Image.new("RGB", (width, frame_height * len(frames)))
    for n, frame in enumerate(frames):
        sheet.paste(frame, (0, frame_height * n))
    palette = sheet.quantize(256, kmeans=1, dither=Image.Dither.NONE)
    first, *others = [
        frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames
    ]
    first.save(
        HERE / "restart.gif",
        save_all=True,
        append_images=others,
        duration=durations,
        loop=0,
        optimize=True,
    )
    page.close()
    drawing.close()


def main() -> None:
    """Make all pictures."""
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("`chromium` is not on the PATH.")
    with tempfile.TemporaryDirectory() as directory, sync_playwright() as playwright:
        site = Site(Path(directory))
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGS)
        expect.set_options(timeout=20_000)
        try:
            site.manage("migrate", "-v", "0")
            site.start()
            site.run(SUPERUSER)
            for make in (make_demo, make_console, make_admin, make_listen_events, make_restart):
                make(browser, site)
        finally:
            browser.close()
            site.kill()


if __name__ == "__main__":
    main()
