// The official client `openai` for Node.
import assert from 'node:assert/strict'
import OpenAI from 'openai'
import { zodResponseFormat, zodTextFormat } from 'openai/helpers/zod'
import { FRANCE, PARAMETERS, PARIS, Report, SAID_AS_JSON, SUM, WEATHER, getWeather } from './weather.mjs'

const connect = (served) => new OpenAI({ baseURL: `${served.root}/v1`, apiKey: 'none', maxRetries: 0 })
const asked = (content) => [{ role: 'user', content }]
const tools = [{ type: 'function', function: { name: 'get_weather', parameters: PARAMETERS, strict: true } }]

export async function chat({ model }) {
  const fields = { model: model.name, messages: asked(FRANCE), temperature: 0, max_tokens: 8 }
  const reply = await connect(model).chat.completions.create(fields)
  assert.match(reply.choices[0].message.content, /Paris/)
}

export async function stream({ scripted }) {
  const fields = { model: scripted.name, messages: asked('Hello'), stream: true }
  let text = ''
  for await (const chunk of await connect(scripted).chat.completions.create(fields)) {
    text += chunk.choices[0].delta.content ?? ''
  }
  assert.equal(text, 'Hello! How can I help?')
}

export async function parse({ model, scripted }) {
  for (const served of [model, scripted]) {
    const reply = await connect(served).chat.completions.parse({
      model: served.name,
      messages: asked(SAID_AS_JSON),
      response_format: zodResponseFormat(Report, 'report'),
      max_tokens: 60,
      temperature: 0,
    })
    Report.parse(reply.choices[0].message.parsed)
    if (served === scripted) assert.deepEqual(reply.choices[0].message.parsed, PARIS)
  }
}

export async function agent_of_two_steps({ scripted }) {
  const runner = connect(scripted).chat.completions.runTools({
    model: scripted.name,
    messages: asked(WEATHER),
    tools: [
      {
        type: 'function',
        function: { name: 'get_weather', parameters: PARAMETERS, parse: JSON.parse, function: getWeather },
      },
    ],
  })
  assert.equal(await runner.finalContent(), 'It is 18 degrees.')
}

export async function stream_helper_with_tools({ scripted }) {
  const fields = { model: scripted.name, messages: asked(WEATHER), tools }
  const runner = connect(scripted).chat.completions.stream(fields)
  const [call] = (await runner.finalMessage()).tool_calls
  assert.deepEqual(JSON.parse(call.function.arguments), { city: 'Paris' })
}

export async function embeddings_are_refused({ model }) {
  const asks = connect(model).embeddings.create({ model: model.name, input: 'hi' })
  await assert.rejects(asks, OpenAI.NotFoundError)
}

export async function responses_stream({ scripted }) {
  const runner = connect(scripted).responses.stream({ model: scripted.name, input: SUM })
  const kinds = []
  for await (const event of runner) kinds.push(event.type)
  assert.equal(kinds[0], 'response.created')
  assert.equal(kinds.at(-1), 'response.completed')
  assert.equal((await runner.finalResponse()).output_text, '42')
}

export async function responses_parse({ scripted }) {
  const reply = await connect(scripted).responses.parse({
    model: scripted.name,
    input: SAID_AS_JSON,
    text: { format: zodTextFormat(Report, 'report') },
  })
  assert.deepEqual(reply.output_parsed, PARIS)
}

export async function responses_agent_of_two_steps({ scripted }) {
  const client = connect(scripted)
  const own = [{ type: 'function', name: 'get_weather', parameters: PARAMETERS, strict: true }]
  const input = asked(WEATHER)
  const first = await client.responses.create({ model: scripted.name, input, tools: own })
  const call = first.output.find((item) => item.type === 'function_call')
  const output = getWeather(JSON.parse(call.arguments))
  input.push(...first.output, { type: 'function_call_output', call_id: call.call_id, output })
  const last = await client.responses.create({ model: scripted.name, input, tools: own })
  assert.equal(last.output_text, 'It is 18 degrees.')
}
