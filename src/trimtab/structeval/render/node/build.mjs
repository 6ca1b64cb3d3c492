// Makes the few files that the renderers need out of node_modules:  node build.mjs TARGET
import { transformAsync } from "@babel/core";
import { createEs2015LinkerPlugin } from "@angular/compiler-cli/linker/babel";
import { build } from "esbuild";
import { copyFileSync, existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { dirname, join, relative, resolve } from "node:path";

const target = process.argv[2];
mkdirSync(target, { recursive: true });
const copies = {
  "react.js": "react/umd/react.production.min.js",
  "react-dom.js": "react-dom/umd/react-dom.production.min.js",
  "vue.js": "vue/dist/vue.global.prod.js",
  "mermaid.js": "mermaid/dist/mermaid.min.js",
  "babel.js": "@babel/standalone/babel.min.js",
};
for (const [name, source] of Object.entries(copies)) copyFileSync(join("node_modules", source), join(target, name));

// Angular's packages are published half compiled. Left so, every page would compile all their directives before the
// first line of its own; the linker does that once, here.
const linked = {
  name: "angular-linker",
  setup(building) {
    building.onLoad({ filter: /@angular[\\/](common|core|forms|platform-browser)[\\/].*\.mjs$/ }, async ({ path }) => {
      const code = await readFile(path, "utf8");
      if (!code.includes("\u0275\u0275ngDeclare")) return { contents: code, loader: "js" };
      const plugin = createEs2015LinkerPlugin({ linkerJitMode: true, fileSystem, logger });
      const made = await transformAsync(code, { filename: path, plugins: [plugin], babelrc: false, configFile: false,
        compact: false, sourceMaps: false });
      return { contents: made.code, loader: "js" };
    });
  },
};
const fileSystem = { resolve, exists: existsSync, dirname, relative, readFile: (path) => readFileSync(path, "utf8") };
const logger = { level: 3, debug() {}, info() {}, warn: console.warn, error: console.error };

// The template compiler stays in: a template is compiled in the page, where its errors are the page's errors.
await build({
  entryPoints: ["angular.mjs"],
  plugins: [linked],
  bundle: true,
  minify: true,
  format: "iife",
  platform: "browser",
  target: "es2022",
  outfile: join(target, "angular.js"),
  logLevel: "error",
});
await build({
  entryPoints: ["compile.mjs"],
  bundle: true,
  format: "cjs",
  platform: "node",
  target: "node18",
  outfile: join(target, "compile.cjs"),
  logLevel: "error",
  external: ["velocityjs", "dustjs-linkedin", "atpl", "liquor", "twig", "ejs", "eco", "jazz", "hamljs", "hamlet",
    "jqtpl", "whiskers", "haml-coffee", "hogan.js", "templayed", "handlebars", "underscore", "walrus", "mustache",
    "just", "ect", "mote", "toffee", "dot", "bracket-template", "ractive", "htmling", "babel-core", "plates",
    "vash", "slm", "marko", "teacup/lib/express", "coffee-script", "squirrelly", "twing", "jade", "pug", "nunjucks",
    "arc-templates", "razor-tmpl", "dust", "lodash", "qejs", "tinyliquid", "liquid-node", "react-dom/server", "react"],
});

const wanted = JSON.parse(readFileSync("package.json", "utf8")).dependencies;
const versions = {};
for (const name of Object.keys(wanted)) {
  versions[name] = JSON.parse(readFileSync(join("node_modules", name, "package.json"), "utf8")).version;
}
writeFileSync(join(target, "versions.json"), JSON.stringify(versions, null, 1));
