// The official client `@anthropic-ai/sdk` for Node.
import assert from 'node:assert/strict'
import Anthropic from '@anthropic-ai/sdk'
import { PARAMETERS, SUM, WEATHER, getWeather } from './weather.mjs'

const connect = (served) => new Anthropic({ baseURL: served.root, apiKey: 'none', maxRetries: 0 })
const asked = (served, content, fields = {}) => ({
  model: served.name,
  max_tokens: 200,
  messages: [{ role: 'user', content }],
  ...fields,
})
const tools = [{ name: 'get_weather', description: 'The weather.', input_schema: PARAMETERS }]

export async function messages({ model }) {
  const reply = await connect(model).messages.create(asked(model, 'Hello', { max_tokens: 8 }))
  assert.equal(reply.content[0].type, 'text')
}

export async function stream({ scripted }) {
  const runner = connect(scripted).messages.stream(asked(scripted, 'Hello'))
  assert.equal(await runner.finalText(), 'Hello! How can I help?')
}

export async function thinking({ scripted }) {
  const fields = { max_tokens: 1500, thinking: { type: 'enabled', budget_tokens: 1024 } }
  const runner = connect(scripted).messages.stream(asked(scripted, SUM, fields))
  const final = await runner.finalMessage()
  assert.deepEqual(final.content.map((block) => block.type), ['thinking', 'text'])
}

export async function agent_of_two_steps({ scripted }) {
  const client = connect(scripted)
  const fields = asked(scripted, WEATHER, { tools })
  const first = await client.messages.stream(fields).finalMessage()
  assert.equal(first.stop_reason, 'tool_use')
  const call = first.content.find((block) => block.type === 'tool_use')
  const result = { type: 'tool_result', tool_use_id: call.id, content: getWeather(call.input) }
  fields.messages.push({ role: 'assistant', content: first.content }, { role: 'user', content: [result] })
  const last = await client.messages.create(fields)
  assert.equal(last.content[0].text, 'It is 18 degrees.')
}

export async function count_tokens({ scripted }) {
  const { model, messages: asks } = asked(scripted, WEATHER)
  const counted = await connect(scripted).messages.countTokens({ model, messages: asks, tools })
  assert.ok(counted.input_tokens > 50)
}
