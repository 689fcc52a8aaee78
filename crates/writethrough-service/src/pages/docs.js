// Reads /openapi.json and lets the reader try each operation. No dependency, nothing from elsewhere.

const el = (name, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children.filter((child) => child != null));
  return node;
};

const methods = ["get", "post", "put", "delete"];

function resolve(api, schema) {
  while (schema && schema.$ref) {
    schema = schema.$ref.slice(2).split("/").reduce((node, part) => node?.[part], api);
  }
  return schema;
}

function example(api, schema) {
  schema = resolve(api, schema) ?? {};
  if (schema.example !== undefined) return schema.example;
  if (schema.enum) return schema.enum[0];
  if (schema.default !== undefined) return schema.default;
  if (schema.properties) {
    return Object.fromEntries(
      Object.entries(schema.properties).filter(([name]) => !schema.required || schema.required.includes(name) || name === "description").map(([name, part]) => [name, example(api, part)]),
    );
  }
  return { string: "text", number: 1, integer: 1, boolean: true, array: [] }[schema.type] ?? null;
}

// Kept in the page alone: a reload forgets it.
const token = el("input", { type: "password", autocomplete: "off", placeholder: "none" });

function operation(api, path, method, description) {
  const inputs = (description.parameters ?? []).map((parameter) => {
    const input = el("input", {
      value: parameter.in === "path" ? "550e8400-e29b-41d4-a716-446655440001" : "",
      placeholder: parameter.in === "query" ? "not set" : "",
    });
    const label = el("label", { title: parameter.description ?? "" },
      el("span", {}, `${parameter.name} `, el("small", { className: "muted" }, `(${parameter.in})`)),
      input);
    return { parameter, input, label };
  });
  const content = description.requestBody?.content?.["application/json"];
  const body = content
    ? el("textarea", { value: JSON.stringify(example(api, content.schema), null, 2), spellcheck: false })
    : null;
  const answer = el("div");
  const send = async () => {
    let target = path;
    const query = new URLSearchParams();
    const headers = {};
    for (const { parameter, input } of inputs) {
      if (!input.value && parameter.in !== "path") continue;
      if (parameter.in === "path") target = target.replace(`{${parameter.name}}`, encodeURIComponent(input.value));
      else if (parameter.in === "query") query.set(parameter.name, input.value);
      else headers[parameter.name] = input.value;
    }
    if (body) headers["content-type"] = "application/json";
    if (token.value && description.security?.length) headers.authorization = `Bearer ${token.value}`;
    if (query.size) target += `?${query}`;
    const begun = performance.now();
    answer.replaceChildren(el("p", { className: "muted" }, "…"));
    try {
      const response = await fetch(target, { method: method.toUpperCase(), headers, body: body?.value, cache: "no-store" });
      const text = await response.text();
      const spent = (performance.now() - begun).toFixed(1);
      let shown = text;
      try { shown = JSON.stringify(JSON.parse(text), null, 2); } catch { /* not JSON: as it is */ }
      const lines = [...response.headers].map(([name, value]) => `${name}: ${value}`).join("\n");
      answer.replaceChildren(
        el("p", {}, el("strong", {}, `${response.status} ${response.statusText}`), ` ${method.toUpperCase()} ${target}, ${spent} ms`),
        el("pre", {}, lines), el("pre", {}, shown));
    } catch (error) {
      answer.replaceChildren(el("p", {}, `No answer: ${error.message}`));
    }
  };
  const statuses = el("table", {}, ...Object.entries(description.responses ?? {}).map(([status, response]) =>
    el("tr", {}, el("td", {}, el("code", {}, status)), el("td", {}, response.description ?? ""))));
  return el("details", {},
    el("summary", {},
      el("code", { className: `method ${method.toUpperCase()}` }, method.toUpperCase()),
      el("code", {}, path),
      el("span", { className: "muted" }, description.summary ?? description.description ?? "")),
    ...inputs.map(({ label }) => label),
    body && el("label", {}, el("span", {}, "body"), body),
    el("button", { type: "button", onclick: send }, "Send"),
    answer,
    statuses);
}

async function main() {
  const api = await (await fetch("/openapi.json")).json();
  document.getElementById("title").textContent = api.info.title;
  document.getElementById("about").append(
    ...(api.info.description ?? "").split("\n\n").map((text) => el("p", { style: "white-space: pre-line" }, text)));
  const schemes = Object.values(api.components?.securitySchemes ?? {});
  document.getElementById("about").append(
    ...schemes.map((scheme) => el("label", { title: scheme.description ?? "" }, el("span", {}, "admin token"), token)));
  const groups = new Map((api.tags ?? []).map((tag) => [tag.name, { tag, operations: [] }]));
  for (const [path, item] of Object.entries(api.paths)) {
    for (const method of methods.filter((name) => item[name])) {
      const name = item[method].tags?.[0] ?? "other";
      if (!groups.has(name)) groups.set(name, { tag: { name }, operations: [] });
      groups.get(name).operations.push(operation(api, path, method, item[method]));
    }
  }
  document.getElementById("operations").replaceChildren(
    ...[...groups.values()].filter((group) => group.operations.length).flatMap((group) => [
      el("h2", {}, group.tag.name),
      el("p", { className: "muted" }, group.tag.description ?? ""),
      ...group.operations,
    ]));
}

main().catch((error) => {
  document.getElementById("operations").textContent = `The description could not be read: ${error.message}`;
});
