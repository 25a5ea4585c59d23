"""Holds the page that records a question and plays the answer while it comes; it needs nothing beside it."""

from __future__ import annotations

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>EchoX</title>
<style>
:root{color-scheme:light dark;--line:#8884;--good:#1a7f37;--bad:#b35900}
body{font:16px/1.55 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem}
h1{margin-bottom:.2rem}.soft{opacity:.75}
button{font:inherit;padding:.6rem 1.1rem;border-radius:8px;border:1px solid var(--line);cursor:pointer}
button:disabled{opacity:.5;cursor:default}
#speak.on{background:var(--bad);color:#fff}
.turn{border:1px solid var(--line);border-left:5px solid var(--line);border-radius:8px}
.turn{padding:.6rem 1rem;margin:.8rem 0}
.turn.model{border-left-color:var(--good)}.turn p{margin:.2rem 0}
canvas{width:100%;height:4.5rem;border-bottom:1px solid var(--line)}
.failed{color:var(--bad)}
</style></head><body>
<h1>EchoX</h1>
<p class="soft" id="about">Press, speak, press again. The answer begins before its text has ended.</p>
<p><button id="speak">Speak</button> <button id="stop" disabled>Stop</button> <button id="forget">Forget all</button>
<input type="file" id="file" accept="audio/*" aria-label="ask with an audio file"></p>
<p id="state" role="status" class="soft"></p>
<div id="turns"></div>
<script>
"use strict";
const $ = id => document.getElementById(id);
const token = new URLSearchParams(location.search).get("token");
const headers = token ? {Authorization: "Bearer " + token} : {};
let context, recording, running, history = [], playAt = 0, sources = [];
const say = text => { $("state").textContent = text; };
const told = ({error, fix}) => `${error}. ${fix[0].toUpperCase()}${fix.slice(1)}.`;

fetch("about", {headers}).then(async r => {
  const about = await r.json();
  if (!r.ok) { say(told(about)); return; }
  $("about").textContent += ` Run: ${about.name}. Questions of up to ${about.question_s} s.`;
});

async function sound() {
  context = context || new AudioContext();
  await context.resume();
  return context;
}

const tap = `registerProcessor("tap", class extends AudioWorkletProcessor {
  process(inputs) { if (inputs[0][0]) this.port.postMessage(inputs[0][0].slice()); return true; }
});`;

async function listen() {
  const ctx = await sound();
  const stream = await navigator.mediaDevices.getUserMedia({audio: {channelCount: 1}});
  if (!ctx.tapped) {
    await ctx.audioWorklet.addModule(URL.createObjectURL(new Blob([tap], {type: "text/javascript"})));
    ctx.tapped = true;
  }
  const source = ctx.createMediaStreamSource(stream), node = new AudioWorkletNode(ctx, "tap"), parts = [];
  node.port.onmessage = message => parts.push(message.data);
  source.connect(node);
  recording = {stream, source, node, parts};
  $("speak").textContent = "Ask"; $("speak").className = "on"; say("listening");
}

function heard() {
  recording.source.disconnect(); recording.node.disconnect();
  recording.stream.getTracks().forEach(track => track.stop());
  const parts = recording.parts; recording = null;
  $("speak").textContent = "Speak"; $("speak").className = "";
  return wav(parts, context.sampleRate);
}

function wav(parts, rate) {
  const count = parts.reduce((sum, part) => sum + part.length, 0);
  const view = new DataView(new ArrayBuffer(44 + 2 * count));
  const text = (at, word) => [...word].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF"); view.setUint32(4, 36 + 2 * count, true); text(8, "WAVEfmt "); view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); view.setUint16(22, 1, true); view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true); view.setUint16(32, 2, true); view.setUint16(34, 16, true);
  text(36, "data"); view.setUint32(40, 2 * count, true);
  let at = 44;
  for (const part of parts) for (const value of part) {
    view.setInt16(at, 32767 * Math.max(-1, Math.min(1, value)), true); at += 2;
  }
  return new Blob([view], {type: "audio/wav"});
}

async function base64(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let text = "";
  for (let at = 0; at < bytes.length; at += 32768) text += String.fromCharCode(...bytes.subarray(at, at + 32768));
  return btoa(text);
}

function turn(who, text) {
  const box = document.createElement("div"), line = document.createElement("p");
  box.className = "turn " + who; line.textContent = text; box.append(line); $("turns").append(box);
  return {box, line};
}

function play(event) {
  const bytes = Uint8Array.from(atob(event.pcm16), c => c.charCodeAt(0));
  const pcm = new Int16Array(bytes.buffer), buffer = context.createBuffer(1, pcm.length, event.rate);
  buffer.getChannelData(0).set(Float32Array.from(pcm, value => value / 32768));
  const source = context.createBufferSource();
  source.buffer = buffer; source.connect(context.destination);
  playAt = Math.max(playAt, context.currentTime + 0.05);
  source.start(playAt); playAt += buffer.duration; sources.push(source);
}

function draw(canvas, cuts) {
  const scores = cuts.flatMap(cut => cut.scores), pen = canvas.getContext("2d");
  const wide = canvas.width = canvas.clientWidth * devicePixelRatio;
  const high = canvas.height = canvas.clientHeight * devicePixelRatio;
  const top = Math.max(0.2, ...scores), low = Math.min(0, ...scores), step = wide / scores.length;
  const y = value => high - 2 - (value - low) / (top - low) * (high - 4);
  pen.fillStyle = "#1a7f37";
  scores.forEach((score, i) => pen.fillRect(i * step + 1, Math.min(y(score), y(0)), Math.max(1, step - 2),
    Math.max(1, Math.abs(y(score) - y(0)))));
  pen.fillStyle = "#b35900";
  cuts.slice(0, -1).forEach(cut => pen.fillRect(cut.last * step - 1, 0, 2 * devicePixelRatio, high));
}

async function ask(blob) {
  await sound();
  hush();
  const question = turn("user", ""), player = document.createElement("audio");
  player.controls = true; player.src = URL.createObjectURL(blob); question.line.textContent = "…";
  question.box.append(player);
  const answer = turn("model", ""), canvas = document.createElement("canvas"), cuts = [];
  canvas.title = "how much each token looks like the end of a sentence; lines: where the trigger cut";
  running = new AbortController(); $("stop").disabled = false; $("speak").disabled = true; say("asking");
  const began = performance.now();
  let first = true, text = "", said = "", done = false;
  try {
    const body = JSON.stringify({audio: await base64(blob), history, transcript: true});
    const response = await fetch("answer", {method: "POST", signal: running.signal, body,
      headers: {...headers, "Content-Type": "application/json"}});
    if (!response.ok) { const error = await response.json(); throw new Error(told(error)); }
    const reader = response.body.getReader(), decoder = new TextDecoder();
    let rest = "";
    for (;;) {
      const {done: over, value} = await reader.read();
      if (over) break;
      rest += decoder.decode(value, {stream: true});
      const lines = rest.split("\\n"); rest = lines.pop();
      for (const event of lines.map(JSON.parse)) {
        if (event.event === "text") answer.line.textContent = text += event.text;
        if (event.event === "audio") {
          if (first) say(`first sound after ${Math.round(performance.now() - began)} ms`);
          first = false; play(event);
        }
        if (event.event === "cut") { cuts.push(event); answer.box.append(canvas); draw(canvas, cuts); }
        if (event.event === "failed") note(answer.box, `segment ${event.segment + 1}: ${event.why}`);
        if (event.event === "transcript") question.line.textContent = said = event.text;
        if (event.event === "error") throw new Error(told(event));
        if (event.event === "done") { done = true; text = event.text; answer.line.textContent = text || "(nothing)"; }
      }
    }
    if (!done) throw new Error("the answer was cut off");
  } catch (error) {
    if (error.name === "AbortError") { hush(); note(answer.box, "stopped"); }
    else { say(error.message); note(answer.box, error.message); }
  }
  if (done && text && said) history.push({role: "user", text: said}, {role: "assistant", text});
  running = null; $("stop").disabled = true; $("speak").disabled = false;
}

function note(box, text) {
  const line = document.createElement("p");
  line.className = "failed"; line.textContent = text; box.append(line);
}

function hush() {
  sources.forEach(source => { try { source.stop(); } catch (error) { /* it has ended */ } });
  sources = []; playAt = 0;
}

$("speak").onclick = () => (recording ? ask(heard()) : listen()).catch(error => say(error.message));
$("stop").onclick = () => { hush(); if (running) running.abort(); };
$("forget").onclick = () => { hush(); if (running) running.abort(); history = []; $("turns").replaceChildren(); };
$("file").onchange = event => event.target.files[0] && ask(event.target.files[0]).catch(error => say(error.message));
</script></body></html>
"""
