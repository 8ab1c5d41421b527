// Passes what it is asked for on to the worker behind it, wherever that runs, and says through whom it went.
export default {
  async fetch(request, env) {
    const answer = await env.BACKEND.fetch(request);
    const told = new Response(answer.body, answer);
    told.headers.set("x-via", `${env.TITLE} ${env.ATOLL_INSTANCE}`);
    return told;
  },
};
