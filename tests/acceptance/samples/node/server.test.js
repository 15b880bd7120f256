'use strict'

const test = require('node:test')
const assert = require('node:assert')
const http = require('node:http')
const { once } = require('node:events')

const { makeApp } = require('./server.js')

test('greets by name', async () => {
  const server = makeApp().listen(0, '127.0.0.1')
  await once(server, 'listening')
  try {
    const [answer] = await once(http.get({ port: server.address().port, path: '/hello/microvm' }), 'response')
    const [body] = await once(answer, 'data')
    assert.deepStrictEqual(JSON.parse(body), { hello: 'microvm' })
  } finally {
    server.close()
  }
})
