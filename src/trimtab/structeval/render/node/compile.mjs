// Warm compiler: one request after another on standard input, each four bytes of length (big-endian) and JSON
// {kind: "react" | "vue" | "angular", text}; the answer is {code, css, errors, names}. Runs nothing that it compiles.
import Babel from "@babel/standalone";
import * as sfc from "@vue/compiler-sfc";
import ts from "typescript";

const commonjs = (text, presets) => Babel.transform(text, {
  filename: "input.tsx", sourceType: "module", babelrc: false, configFile: false, compact: false,
  presets, plugins: ["transform-modules-commonjs"],
}).code;
const typescript = ["typescript", { isTSX: true, allExtensions: true }];

function react(text) {
  return { code: commonjs(text, [["react", { runtime: "classic", development: false }], typescript]) };
}

function vue(text) {
  if (!/<(template|script|style)\b/.test(text)) { // not a single-file component: a module that uses the global build
    return { code: commonjs(text, [["typescript", { allExtensions: true }]]) };
  }
  const { descriptor, errors } = sfc.parse(text, { filename: "App.vue", sourceMap: false });
  if (errors.length) throw errors[0];
  if (!descriptor.template && !descriptor.script && !descriptor.scriptSetup) throw new Error("no <template> or <script>");
  for (const block of [descriptor.template, descriptor.script, ...descriptor.styles]) {
    if (block?.src) throw new Error(`src="${block.src}" refers to another file`);
  }
  if (descriptor.template?.lang && descriptor.template.lang !== "html") {
    throw new Error(`<template lang="${descriptor.template.lang}"> is not supported`);
  }
  const scoped = descriptor.styles.some((style) => style.scoped);
  const id = "data-v-trimtab";
  const options = { scoped, id, compilerOptions: { scopeId: scoped ? id : undefined } };
  let code = "const component = {};";
  let bindings;
  if (descriptor.script || descriptor.scriptSetup) {
    const made = sfc.compileScript(descriptor, { id, inlineTemplate: true, genDefaultAs: "component", templateOptions: options });
    code = made.content;
    bindings = made.bindings;
  }
  if (descriptor.template && !descriptor.scriptSetup) {
    const made = sfc.compileTemplate({ source: descriptor.template.content, filename: "App.vue", id, scoped,
      compilerOptions: { scopeId: options.compilerOptions.scopeId, bindingMetadata: bindings } });
    if (made.errors.length) throw made.errors[0];
    code += "\n" + made.code.replace(/\bexport (function|const) render\b/, "$1 render") + "\ncomponent.render = render;";
  }
  if (scoped) code += `\ncomponent.__scopeId = "${id}";`;
  code += "\nexport default component;";
  const css = descriptor.styles.map((style) => {
    if (style.lang && style.lang !== "css") throw new Error(`<style lang="${style.lang}"> is not supported`);
    const made = sfc.compileStyle({ source: style.content, filename: "App.vue", id, scoped: style.scoped });
    if (made.errors.length) throw made.errors[0];
    return made.code;
  }).join("\n");
  return { code: commonjs(code, [["typescript", { allExtensions: true }]]), css };
}

function angular(text) {
  const file = ts.createSourceFile("input.ts", text, ts.ScriptTarget.ES2022, true);
  const names = new Set();
  const visit = (node) => {
    if (ts.isDecorator(node) && ts.isCallExpression(node.expression) && node.expression.expression.getText() === "NgModule") {
      const table = node.expression.arguments[0];
      if (table && ts.isObjectLiteralExpression(table)) {
        for (const entry of table.properties) {
          if (ts.isPropertyAssignment(entry) && entry.name.getText() === "declarations" && ts.isArrayLiteralExpression(entry.initializer)) {
            entry.initializer.elements.forEach((one) => names.add(one.getText()));
          }
        }
      }
    }
    ts.forEachChild(node, visit);
  };
  visit(file);
  const made = ts.transpileModule(text, {
    fileName: "input.ts", reportDiagnostics: true,
    compilerOptions: { module: ts.ModuleKind.CommonJS, target: ts.ScriptTarget.ES2022, experimentalDecorators: true,
      emitDecoratorMetadata: true, useDefineForClassFields: false, esModuleInterop: true },
  });
  const errors = made.diagnostics.filter((one) => one.category === ts.DiagnosticCategory.Error).map((one) => {
    const { line } = one.file.getLineAndCharacterOfPosition(one.start ?? 0);
    return `line ${line + 1}: ${ts.flattenDiagnosticMessageText(one.messageText, "\n")}`;
  });
  return { code: made.outputText, names: [...names], errors };
}

const KINDS = { react, vue, angular };

function answer(request) {
  try {
    return { css: "", names: [], errors: [], ...KINDS[request.kind](request.text) };
  } catch (error) {
    return { code: "", css: "", names: [], errors: [String(error?.message ?? error).slice(0, 2000)] };
  }
}

function give(message) {
  const body = Buffer.from(JSON.stringify(message));
  const head = Buffer.alloc(4);
  head.writeUInt32BE(body.length);
  process.stdout.write(Buffer.concat([head, body]));
}

for (const level of ["log", "info", "warn", "error", "debug"]) console[level] = () => {}; // standard output is the protocol
react("export default () => <p/>");
give({ ready: "compile" });
let have = Buffer.alloc(0);
process.stdin.on("data", (part) => {
  have = Buffer.concat([have, part]);
  while (have.length >= 4 && have.length >= 4 + have.readUInt32BE()) {
    const size = have.readUInt32BE();
    const request = JSON.parse(have.subarray(4, 4 + size).toString());
    have = have.subarray(4 + size);
    give(answer(request));
  }
});
