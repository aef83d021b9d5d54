// What the official JavaScript client sees of a running system, as one JSON object on stdout.
//   node look.mjs nats://user:password@host:port
import { connect } from "@nats-io/transport-node";
import { Svcm } from "@nats-io/services";
import { Kvm } from "@nats-io/kv";

const url = new URL(process.argv[2].replace(/^nats:/, "http:"));
const nc = await connect({ servers: url.host, user: url.username, pass: url.password });

async function all(replies) {
  const found = [];
  for await (const reply of await replies) found.push(reply);
  return found;
}

async function bucket(name) {
  const kv = await new Kvm(nc).open(name);
  const entries = {};
  for await (const key of await kv.keys()) entries[key] = (await kv.get(key)).json();
  return entries;
}

const messages = [];
const heard = (async () => {
  for await (const message of nc.subscribe("flowkv.>", { max: 20 })) {
    messages.push({ subject: message.subject, type: message.json().type });
  }
})();
const services = new Svcm(nc).client({ strategy: "timer", maxWait: 3000 }); // all answers, not the quick ones
const seen = {
  ping: await all(services.ping()),
  info: await all(services.info()),
  stats: await all(services.stats()),
  nodes: await bucket("flowkv_nodes"),
  leader: await bucket("flowkv_leader"),
};
await heard;
console.log(JSON.stringify({ ...seen, messages }));
await nc.close();
