// What the cases ask, in words that the scripted model has lines for (see ../script.py).
import { z } from 'zod'

export const FRANCE = 'What is the capital of France?'
export const WEATHER = 'What is the weather in Paris?'
export const SAID = 'It is 18 degrees in Paris. Report that.'
export const SAID_AS_JSON = 'It is 18 degrees in Paris. Report that as JSON.'
export const THOUGHT = 'Think first. What is the weather in Paris?'
export const SUM = 'Think first: what is 17 + 25?'
export const PARIS = { city: 'Paris', degrees: 18 }
export const Report = z.object({ city: z.string().max(12), degrees: z.number().int().min(-60).max(60) })
export const City = z.object({ city: z.string().max(12) })
export const PARAMETERS = z.toJSONSchema(City)
export const getWeather = ({ city }) => `18 degrees in ${city}`
