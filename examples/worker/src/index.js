// A worker with state: a counter that exists once and survives everything, and notes by name.
import { DurableObject } from "cloudflare:workers";
import page from "./page.txt";

export class Counter extends DurableObject {
  async add() {
    const count = ((await this.ctx.storage.get("count")) ?? 0) + 1;
    await this.ctx.storage.put("count", count);
    return count;
  }
}

export default {
  async fetch(request, env) {
    const { pathname } = new URL(request.url);
    const [, what, name = ""] = pathname.split("/");
    if (what === "count") {
      const count = await env.COUNTERS.get(env.COUNTERS.idFromName(name)).add();
      return Response.json({ name, count });
    }
    if (what === "notes" && name) {
      if (request.method === "PUT") {
        await env.NOTES.put(name, request.body);
        return new Response("kept\n");
      }
      const note = await env.NOTES.get(name);
      return note === null ? new Response("no such note\n", { status: 404 }) : new Response(note);
    }
    if (pathname === "/") {
      console.log("asked for the page");
      return new Response(page.replace("GREETING", env.GREETING));
    }
    return new Response("not found\n", { status: 404 });
  },
};
