// The page side of Angular: everything a single-file component may import, under the global `trimtabAngular`.
import "reflect-metadata";
import "zone.js";
import "@angular/compiler";
import * as core from "@angular/core";
import * as common from "@angular/common";
import * as forms from "@angular/forms";
import * as browser from "@angular/platform-browser";
import * as rxjs from "rxjs";
import * as operators from "rxjs/operators";

const EVERYDAY = [common.CommonModule, forms.FormsModule, forms.ReactiveFormsModule];
let declared = new Set();
let last = null; // the component that was defined last
let named = null; // the one that is called AppComponent or App
let root = null; // what the text itself starts
const known = new Map();

// Written for any Angular: since 19 a component without `standalone` is standalone, before it was not. One that a module
// of the same text declares is not standalone; any other is, and gets the everyday directives if it names no imports.
function Component(metadata) {
  return (type) => {
    const mine = { ...metadata };
    if (declared.has(type.name)) mine.standalone = false;
    else {
      if (mine.standalone === false) mine.standalone = true;
      mine.imports = [...(mine.imports ?? []), ...EVERYDAY];
    }
    const made = core.Component(mine)(type) ?? type;
    known.set(made, mine.selector ?? "ng-component");
    last = made;
    if (/^App(Component)?$/.test(type.name)) named = made;
    return made;
  };
}
Object.assign(Component, core.Component);

const report = (error) => globalThis.trimtabError(error);
class Reporter { handleError(error) { report(error); } }
const providers = [{ provide: core.ErrorHandler, useClass: Reporter }];
const start = {
  module(type) { root = { module: type }; return Promise.resolve(); },
  component(type) { root = { component: type }; return Promise.resolve(); },
};
const modules = {
  "@angular/core": { ...core, Component, enableProdMode() {} },
  "@angular/common": common,
  "@angular/forms": forms,
  "@angular/platform-browser": { ...browser, bootstrapApplication: start.component },
  "@angular/platform-browser-dynamic": { platformBrowserDynamic: () => ({ bootstrapModule: start.module }) },
  "@angular/platform-browser/animations": { BrowserAnimationsModule: browser.BrowserModule,
    NoopAnimationsModule: browser.BrowserModule, provideAnimations: () => [], provideNoopAnimations: () => [] },
  rxjs, "rxjs/operators": operators,
  "zone.js": {}, "zone.js/dist/zone": {}, "reflect-metadata": {},
};
modules["@angular/platform-browser"].platformBrowser = modules["@angular/platform-browser-dynamic"].platformBrowserDynamic;

function host(type) {
  const selector = (known.get(type) ?? "ng-component").split(",")[0].trim();
  const tag = /^[a-z][\w-]*/i.exec(selector)?.[0] ?? "div";
  const element = document.createElement(tag);
  const attribute = /\[([\w-]+)\]/.exec(selector)?.[1];
  if (attribute) element.setAttribute(attribute, "");
  const klass = /\.([\w-]+)/.exec(selector)?.[1];
  if (klass) element.className = klass;
  document.body.append(element);
}

globalThis.trimtabAngular = async (body, names) => {
  declared = new Set(names);
  const exported = {};
  const need = (name) => {
    if (name in modules) return modules[name];
    throw new Error(`Cannot find module '${name}'`);
  };
  body(need, exported);
  const everything = Object.values(exported);
  const bootModule = root?.module ?? (root ? null : everything.find((one) => one?.ɵmod?.bootstrap?.length));
  if (bootModule) {
    const boot = bootModule.ɵmod.bootstrap;
    const types = typeof boot === "function" ? boot() : boot;
    types.forEach(host);
    await browser.platformBrowser([]).bootstrapModule(bootModule, {}).catch(report);
    return;
  }
  let type = root?.component ?? named ?? exported.default ?? last;
  if (!type || !known.has(type)) throw new Error("no component found");
  if (declared.has(type.name)) { // declared by a module that starts nothing
    const owner = everything.find((one) => one?.ɵmod && [one.ɵmod.declarations].flat(3)
      .flatMap((some) => typeof some === "function" && !known.has(some) ? some() : some).includes(type));
    class Starter { ngDoBootstrap(app) { app.bootstrap(type); } }
    core.NgModule({ imports: [browser.BrowserModule, ...(owner ? [owner] : [])] })(Starter);
    host(type);
    await browser.platformBrowser([]).bootstrapModule(Starter).catch(report);
    return;
  }
  host(type);
  await browser.bootstrapApplication(type, { providers }).catch(report);
};
