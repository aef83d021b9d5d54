// `node run.mjs FILE CASE`: runs one exported function of a file; what it throws ends with status 1.
const [file, name] = process.argv.slice(2)
const cases = await import(`./${file}`)
await cases[name]({
  model: { root: process.env.FLOWKV_CLIENTS_MODEL, name: 'SmolLM2-135M-Instruct' },
  scripted: { root: process.env.FLOWKV_CLIENTS_SCRIPTED, name: 'scripted' },
})
