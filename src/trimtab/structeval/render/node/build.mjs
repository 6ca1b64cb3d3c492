// Makes the few files that the renderers need out of node_modules:  node build.mjs TARGET
import { build } from "esbuild";
import { copyFileSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";

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

// The template compiler stays in: a template is compiled in the page, where its errors are the page's errors.
await build({
  entryPoints: ["angular.mjs"],
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
