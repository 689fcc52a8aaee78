import createClient from "openapi-fetch";
import type { paths } from "./api.js";

declare const process: { argv: string[] };
const client = createClient<paths>({ baseUrl: process.argv[2] });

function sent<T>(answer: { data?: T; error?: unknown }): T {
  if (answer.data === undefined) throw new Error(JSON.stringify(answer.error));
  return answer.data;
}

const made = sent(await client.POST("/items", { body: { name: "Lamp", price: 24.5 } }));
const path = { params: { path: { id: made.id } } };
const read = sent(await client.GET("/items/{id}", path));
if (read.name !== "Lamp" || read.price !== 24.5 || read.version !== 1) throw new Error(JSON.stringify(read));
// An item may be put back as it was read.
const put = sent(await client.PUT("/items/{id}", { ...path, body: { ...read, name: "Desk", price: 0.29 } }));
if (put.version !== 2 || put.price !== 0.29) throw new Error(JSON.stringify(put));
const page = sent(await client.GET("/items", { params: { query: { limit: 5 } } }));
if (!page.items.some((item) => item.id === made.id)) throw new Error(JSON.stringify(page));
sent(await client.DELETE("/items/{id}", path));
const gone = await client.GET("/items/{id}", path);
if (gone.response.status !== 404 || gone.error === undefined) throw new Error("it is still there");
console.log("TypeScript: created, read, replaced, listed, deleted");
export {};
