// Vercel's AI SDK, by its providers for servers like OpenAI's, for OpenAI (Responses) and for Anthropic.
import assert from 'node:assert/strict'
import { createAnthropic } from '@ai-sdk/anthropic'
import { createOpenAI } from '@ai-sdk/openai'
import { createOpenAICompatible } from '@ai-sdk/openai-compatible'
import { Output, generateObject, generateText, isStepCount, streamText, tool } from 'ai'
import { City, PARIS, Report, SAID_AS_JSON, SUM, THOUGHT, WEATHER, getWeather } from './weather.mjs'

const compatible = (served) =>
  createOpenAICompatible({
    name: 'flowkv',
    baseURL: `${served.root}/v1`,
    apiKey: 'none',
    supportsStructuredOutputs: true,
  })(served.name)
const openai = (served) => createOpenAI({ baseURL: `${served.root}/v1`, apiKey: 'none' })(served.name)
const anthropic = (served) => createAnthropic({ baseURL: `${served.root}/v1`, apiKey: 'none' })(served.name)

const agent = (model, prompt = WEATHER) => ({
  model,
  prompt,
  stopWhen: isStepCount(3),
  maxRetries: 0,
  tools: {
    get_weather: tool({
      description: 'The weather in a city, now.',
      inputSchema: City,
      execute: async (input) => getWeather(input),
    }),
  },
})

export async function generateObject_({ model, scripted }) {
  for (const served of [model, scripted]) {
    const { object } = await generateObject({
      model: compatible(served),
      schema: Report,
      prompt: SAID_AS_JSON,
      maxOutputTokens: 60,
      temperature: 0,
      maxRetries: 0,
    })
    if (served === scripted) assert.deepEqual(object, PARIS)
  }
}

export async function Output_object({ scripted }) {
  const output = Output.object({ schema: Report })
  const reply = await generateText({ model: compatible(scripted), output, prompt: SAID_AS_JSON, maxRetries: 0 })
  assert.deepEqual(reply.output, PARIS)
}

export async function generateText_with_tools({ scripted }) {
  assert.equal((await generateText(agent(compatible(scripted)))).text, 'It is 18 degrees.')
}

export async function streamText_with_tools({ scripted }) {
  const reply = streamText(agent(compatible(scripted)))
  let text = ''
  for await (const part of reply.textStream) text += part
  assert.equal(text, 'It is 18 degrees.')
  assert.equal((await reply.steps).length, 2)
}

export async function reasoning({ scripted }) {
  const reply = streamText({ model: compatible(scripted), prompt: SUM, maxRetries: 0 })
  assert.equal(await reply.text, '42')
  assert.equal(await reply.reasoningText, 'Ten and thirty, two more.')
}

export async function streamText_by_Responses({ scripted }) {
  const reply = streamText(agent(openai(scripted)))
  assert.equal(await reply.text, 'It is 18 degrees.')
}

export async function streamText_by_Messages({ scripted }) {
  const reply = streamText(agent(anthropic(scripted)))
  assert.equal(await reply.text, 'It is 18 degrees.')
}

export async function streamText_with_Output_object({ scripted }) {
  const output = Output.object({ schema: Report })
  const reply = streamText({ model: compatible(scripted), output, prompt: SAID_AS_JSON, maxRetries: 0 })
  assert.deepEqual(await reply.output, PARIS)
}

export async function toolChoice_required({ model }) {
  const fields = { ...agent(compatible(model)), toolChoice: 'required', stopWhen: isStepCount(1) }
  const reply = await generateText({ ...fields, maxOutputTokens: 100, temperature: 0 })
  assert.equal(reply.toolCalls[0].toolName, 'get_weather')
  assert.equal(typeof reply.toolCalls[0].input.city, 'string')
}

export async function generateObject_by_Responses({ scripted }) {
  const fields = { schema: Report, prompt: SAID_AS_JSON, maxRetries: 0 }
  assert.deepEqual((await generateObject({ model: openai(scripted), ...fields })).object, PARIS)
}

export async function generateObject_by_Messages({ scripted }) {
  const fields = { schema: Report, prompt: SAID_AS_JSON, maxRetries: 0 }
  assert.deepEqual((await generateObject({ model: anthropic(scripted), ...fields })).object, PARIS)
}

export async function reasoning_by_Messages({ scripted }) {
  const reply = streamText({ model: anthropic(scripted), prompt: SUM, maxRetries: 0 })
  assert.equal(await reply.text, '42')
  assert.equal(await reply.reasoningText, 'Ten and thirty, two more.')
}

export async function reasoning_by_Responses({ scripted }) {
  const reply = streamText({ model: openai(scripted), prompt: SUM, maxRetries: 0 })
  assert.equal(await reply.text, '42')
}

export async function agents_that_think({ scripted }) {
  const stateless = { openai: { store: false, forceReasoning: true, reasoningSummary: 'auto' } }
  for (const provider of [compatible, anthropic, openai]) {
    const fields = { ...agent(provider(scripted), THOUGHT), providerOptions: stateless }
    assert.equal((await generateText(fields)).text, 'It is 18 degrees.', provider.name)
  }
}
