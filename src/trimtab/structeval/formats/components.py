"""React, Vue and Angular: compiled for real in Node, mounted in a page. A whole HTML page is taken as a page.

Not covered: other packages than the framework itself (a router, a store, a component library), several files, SCSS.
"""

from __future__ import annotations

import json
import re
from typing import Any

from trimtab.structeval.formats.base import UNDECIDED, Checked, Format, bad
from trimtab.structeval.formats.jobs import CompileJob, CompilerKind, Job, PageJob

DOCUMENT = re.compile(r"^\s*(<!doctype\s+html|<html\b)", re.IGNORECASE)
SCRIPT_LIKE = re.compile(r"[({=<]")
MOUNT_ID = re.compile(r"""(?:getElementById\(\s*["'`]|querySelector\(\s*["'`]#|mount\(\s*["'`]#)([A-Za-z][\w-]*)""")

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>component</title>
<style>body { font-family: sans-serif }
CSS</style><body>MOUNTS<div id="root"></div>
LIBRARIES
<script>
globalThis.trimtabError = (error) => reportError(error instanceof Error ? error : new Error(String(error)));
(async () => {
  try { SETUP } catch (error) { trimtabError(error); }
  document.documentElement.setAttribute("data-trimtab-done", "");
})();
</script></body></html>"""

REACT_SETUP = """
const exported = {};
let started = false;
const client = { ...ReactDOM,
  createRoot: (...a) => { started = true; const root = ReactDOM.createRoot(...a);
    return { render: (what) => ReactDOM.flushSync(() => root.render(what)), unmount: () => root.unmount() }; },
  render: (...a) => { started = true; return ReactDOM.render(...a); } };
const anything = new Proxy(() => anything, { get: () => anything });
const whole = (what) => ({ ...what, default: what, __esModule: true });
const modules = { react: whole(React), "react-dom": whole(client), "react-dom/client": whole(client),
  "prop-types": anything };
const need = (name) => {
  if (name in modules) return modules[name];
  if (/\\.(css|scss|less)$/.test(name)) return {};
  throw new Error(`Cannot find module '${name}'`);
};
const run = new Function("require", "exports", "module", "React", "ReactDOM", CODE + NAMED);
const module = { exports: exported };
const named = run(need, exported, module, React, client);
if (!started) {
  const found = module.exports;
  const type = found.default ?? named ?? Object.entries(found).filter(([k, v]) => /^[A-Z]/.test(k) && v).pop()?.[1];
  if (!type) throw new Error("no component found");
  const what = React.isValidElement(type) ? type : React.createElement(type);
  ReactDOM.flushSync(() => ReactDOM.createRoot(document.getElementById("root")).render(what));
}"""

VUE_SETUP = """
const exported = {};
let started = false;
const createApp = (...a) => {
  const app = Vue.createApp(...a);
  app.config.errorHandler = (error) => trimtabError(error);
  const mount = app.mount;
  app.mount = (where) => { started = true; return mount.call(app, where); };
  return app;
};
const vue = { ...Vue, createApp };
const need = (name) => {
  if (name === "vue") return { ...vue, default: vue, __esModule: true };
  if (/\\.(css|scss|less)$/.test(name)) return {};
  throw new Error(`Cannot find module '${name}'`);
};
const module = { exports: exported };
new Function("require", "exports", "module", "Vue", CODE)(need, exported, module, vue);
if (!started) {
  const type = module.exports.default;
  if (!type) throw new Error("no component found");
  createApp(type).mount("#root");
  await Vue.nextTick();
}"""

ANGULAR_SETUP = """
const module = { exports: {} };
const run = new Function("require", "exports", "module", CODE);
await trimtabAngular((need, exported) => run(need, exported, { exports: exported }), NAMES);
if (/\\bNG0\\d+/.test(globalThis.trimtabSaid ?? "")) throw new Error(globalThis.trimtabSaid);"""

LISTEN = """<script>for (const level of ["error", "warn"]) {
  const say = console[level];
  console[level] = (...a) => { const text = a.map(String).join(" ");
    if (/\\bNG0(303|304)\\b/.test(text)) globalThis.trimtabSaid = text.slice(0, 400);
    say.apply(console, a); };
}</script>"""


def page_for(kind: CompilerKind, compiled: dict[str, Any]) -> PageJob:
    """The page that mounts what the compiler made (its answer to a CompileJob)."""
    code, css = str(compiled["code"]), str(compiled["css"])
    libraries = {"react": ("react", "react-dom"), "vue": ("vue",), "angular": ("angular",)}[kind]
    setup = {"react": REACT_SETUP, "vue": VUE_SETUP, "angular": ANGULAR_SETUP}[kind]
    named = ""
    if kind == "react":
        names = re.findall(r"^(?:async )?(?:function|const|let|var|class)\s+([A-Z]\w*)", code, re.MULTILINE)
        chosen = "App" if "App" in names else names[-1] if names else None
        named = f"\n;return {chosen};" if chosen else ""
    setup = setup.replace("NAMES", _quoted(compiled.get("names", [])))
    setup = setup.replace("CODE + NAMED", "CODE").replace("CODE", _quoted(code + named), 1)
    scripts = "".join(f'<script src="/trimtab/{name}.js"></script>' for name in libraries)
    mounts = "".join(f'<div id="{name}"></div>' for name in dict.fromkeys(MOUNT_ID.findall(code)) if name != "root")
    html = PAGE.replace("CSS", css.replace("</", "<\\/"), 1).replace("MOUNTS", mounts if kind != "angular" else "", 1)
    html = html.replace("LIBRARIES", (LISTEN if kind == "angular" else "") + scripts, 1).replace("SETUP", setup, 1)
    return PageJob(html, waits=True, must_mount=kind != "angular" and not mounts)


def _quoted(value: object) -> str:
    """As a JavaScript literal that cannot end the script element around it."""
    return json.dumps(value).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _examine_react(text: str) -> Checked:
    return UNDECIDED if SCRIPT_LIKE.search(text) else bad("no code in the text")


def _examine_vue(text: str) -> Checked:
    return UNDECIDED if SCRIPT_LIKE.search(text) else bad("no component in the text")


def _examine_angular(text: str) -> Checked:
    if DOCUMENT.match(text):
        return bad("an HTML page, not an Angular component")
    return UNDECIDED if "@Component" in text else bad("no @Component in the text")


def _plan_react(text: str) -> Job:
    if DOCUMENT.match(text):
        return PageJob(text)
    return CompileJob("react", text)


def _plan_vue(text: str) -> Job:
    if DOCUMENT.match(text):
        return PageJob(text)
    return CompileJob("vue", text)


def _plan_angular(text: str) -> Job:
    return CompileJob("angular", text)


REACT = Format("React", _examine_react, _plan_react, ("browser", "node"))
VUE = Format("Vue", _examine_vue, _plan_vue, ("browser", "node"))
ANGULAR = Format("Angular", _examine_angular, _plan_angular, ("browser", "node"))
