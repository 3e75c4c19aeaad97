"""What the Redis history runs inside the server: each script is atomic.

A script touches the keys of one token only, or one key of the history's own, and is
given all of them: so it runs on a cluster too. Numbers are formatted by hand, since Lua
would write one of 16 digits as ``1.7e+15``.

An entry of the stream has the fields ``m`` (its time in microseconds, and the lengths of its
action, data, kind and own id) and ``e`` (these four, one after the other). The first of a run
of numbers has ``p`` next, the place before. The last of an append has ``r`` at its end, the
append's reference.
"""

from __future__ import annotations

import hashlib


class Script:
    """A Lua script, and the name under which the server remembers it."""

    def __init__(self, source: str) -> None:
        self.source = source
        # The name that Redis gives it; nothing here is kept secret by it.
        self.sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


_COMMON = """
local function micros()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end
local function text(number)
  return string.format('%.0f', number)
end
local function created(entry)
  return tonumber(string.match(entry[2][2], '^%d+'))
end
-- A server that was started anew, or took over from another, has a new run id. It may
-- have lost its last writes.
local function run()
  return string.match(redis.call('INFO', 'server'), 'run_id:(%w+)') or ''
end
"""

APPEND = Script(
    _COMMON
    + """
local head, events, ids, marker = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local floor, elapsed, ref = ARGV[1], ARGV[2], ARGV[3]
local max_events, max_bytes, max_age = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local events_given = (#ARGV - 8) / 4

-- An attempt that arrives late, after the one that followed it.
local done = redis.call('GET', marker)
if done then return done end

local now = micros()
if elapsed ~= '' then
  -- Not the first attempt: an earlier one may have run, and its answer got lost.
  local since, at = now - tonumber(elapsed), '+'
  while at do
    local some = redis.call('XREVRANGE', events, at, '-', 'COUNT', 50)
    at = nil
    for _, entry in ipairs(some) do
      local seq = string.match(entry[1], '^%d+')
      local fields = entry[2]
      -- The last of an append has the reference: it is the one that is trimmed last.
      if fields[#fields - 1] == 'r' and fields[#fields] == ref then
        return text(seq - events_given + 1)
      end
      if created(entry) < since then at = nil break end
      at = text(seq - 1)
    end
  end
end

local known = redis.call('HMGET', head, 'last', 'run', 'bytes')
local last, this_run = tonumber(known[1]), run()
local seq, before
if not last then
  if floor == '' then return false end
  -- The server may have evicted the head alone. (A full server refuses a script at its
  -- first write only, and DEL is one that it lets pass.)
  if redis.call('EXISTS', events, ids) > 0 then redis.call('DEL', events, ids) end
  before, seq = floor, math.max(now, floor + 1)
elseif known[2] ~= this_run then
  -- Numbers above the last one may have been given out before writes were lost: they
  -- are left out. The distance counts only when the clock was set back.
  before, seq = text(last), math.max(now, last + 1000000000)
else
  seq = last + 1
end
local first, time = seq, text(now)
-- All events may have expired, and the head is still there.
local length = redis.call('XLEN', events)
local bytes = length > 0 and tonumber(known[3]) or 0

for at = 9, #ARGV, 4 do
  local action, data, kind, own = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
  -- In as few strings as can be: they are what reading costs.
  local lengths = table.concat({time, #action, #data, #kind, #own}, ' ')
  local entry = {'m', lengths, 'e', action .. data .. kind .. own}
  if before and seq == first then entry[5], entry[6] = 'p', before end
  if at + 4 > #ARGV then
    entry[#entry + 1] = 'r'
    entry[#entry + 1] = ref
  end
  redis.call('XADD', events, text(seq) .. '-0', unpack(entry))
  if own ~= '' then redis.call('HSETNX', ids, own, text(seq)) end
  if kind == 'finish' then redis.call('HSET', head, 'closed', text(seq)) end
  bytes = bytes + #data
  seq = seq + 1
end
length = length + events_given
redis.call('HSET', head, 'last', text(seq - 1), 'run', this_run, 'bytes', text(bytes))
redis.call('PEXPIRE', head, ARGV[8])
redis.call('PEXPIRE', events, ARGV[7])
redis.call('PEXPIRE', ids, ARGV[7])
if elapsed ~= '' then redis.call('SET', marker, text(first), 'PX', 600000) end

-- Remove what is too many or too old. Entries are read in growing batches: mostly there
-- is one to remove, or none.
local batch = 1
while true do
  local oldest = redis.call('XRANGE', events, '-', '+', 'COUNT', batch)
  local gone = 0
  for _, entry in ipairs(oldest) do
    local kept = length - gone
    local data, size = string.match(entry[2][2], '^%d+ %d+ (%d+) %d+ (%d+)$')
    if kept <= max_events and (bytes <= max_bytes or kept == 1)
        and created(entry) >= now - max_age then break end
    local own = tonumber(size) > 0 and string.sub(entry[2][4], -size)
    if own and redis.call('HGET', ids, own) == string.match(entry[1], '^%d+') then
      redis.call('HDEL', ids, own)
    end
    bytes = bytes - data
    gone = gone + 1
  end
  if gone > 0 then
    length = length - gone
    redis.call('XTRIM', events, 'MAXLEN', length)
    redis.call('HSET', head, 'bytes', text(bytes))
  end
  if gone < batch then break end
  batch = math.min(batch * 2, 100)
end
return text(first)
"""
)
"""Append events, once whatever attempts arrive in whatever order; give the first number.

Nil when the token has no history and the floor was not given. Keys: head, events, own
ids, marker of the attempt. Arguments: floor or ``""``; microseconds since before the
first attempt, or ``""`` for that one; the reference of all attempts; MAX_EVENTS; MAX_BYTES;
MAX_AGE in microseconds; MAX_AGE and TOKEN_MAX_AGE in milliseconds; then for each event its
action, data, kind and own id or ``""``.
"""

READ = Script(
    """
local head, events = KEYS[1], KEYS[2]
local at, max_events, max_bytes = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local known = redis.call('HMGET', head, 'last', 'closed')
if not known[1] then return false end
local lengths, texts, count, size, batch, before = {}, {}, 0, 0, 8, false
local function reply()
  return {known[1], known[2], before, table.concat(lengths, ' '), table.concat(texts)}
end
while count < max_events do
  local asked = math.min(batch, max_events - count)
  local some = redis.call('XRANGE', events, at, '+', 'COUNT', asked)
  local seq
  for _, entry in ipairs(some) do
    local fields = entry[2]
    size = size + string.match(fields[2], '^%d+ %d+ (%d+)')
    if count > 0 and size > max_bytes then return reply() end
    if count == 0 then before = fields[5] == 'p' and fields[6] end
    count = count + 1
    seq = string.match(entry[1], '^%d+')
    lengths[#lengths + 1], lengths[#lengths + 2] = seq, fields[2]
    texts[count] = fields[4]
  end
  if #some < asked then break end
  at = string.format('%.0f', seq + 1)
  batch = math.min(batch * 2, 250)
end
return reply()
"""
)
"""Read events up to a number and a size; nil when the token has no history.

Gives the last number, that of the last close, the place that the first event found follows
if that is not the number before its own, and the events in two strings, since a client takes
far longer to read many small ones: for each event its number, its time and the lengths of
its action, data, kind and own id; and all of these, one after the other.

Keys: head, events. Arguments: first number wanted, most events, most bytes.
"""

FIND = Script(
    """
local head, events, ids = KEYS[1], KEYS[2], KEYS[3]
local known = redis.call('HMGET', head, 'last', 'closed')
if not known[1] then return false end
local place, kind, complete = redis.call('HGET', ids, ARGV[1]) or ARGV[2], false, 0
if place == '' then return {known[1], known[2], false, false, 0} end
for _, entry in ipairs(redis.call('XRANGE', events, place, place)) do
  local action, data, length = string.match(entry[2][2], '^%d+ (%d+) (%d+) (%d+)')
  kind = string.sub(entry[2][4], action + data + 1, action + data + length)
end
if place == known[1] then complete = 1 end
local after = string.format('%.0f', place + 1)
for _, entry in ipairs(redis.call('XRANGE', events, after, '+', 'COUNT', 1)) do
  local seq, fields = string.match(entry[1], '^%d+'), entry[2]
  -- The first of a run of numbers says which place it follows.
  if seq == after or (fields[5] == 'p' and fields[6] == place) then complete = 1 end
end
return {known[1], known[2], place, kind, complete}
"""
)
"""Find the place that a cursor means, and whether all events after it are kept; nil when the
token has no history.

Gives the last number, that of the last close, the place, the kind of the event there, and 1 if
all events after it are kept.

Keys: head, events, own ids. Arguments: the cursor; the place if it is a number, or ``""``.
"""

FLOOR = Script(
    _COMMON
    + """
local known = redis.call('HMGET', KEYS[1], 'floor', 'made', 'epoch')
local floor, made, epoch = tonumber(known[1]), tonumber(known[2]), known[3]
local now, half = micros(), tonumber(ARGV[2])
if not (floor and made and epoch) then
  floor, made, epoch = now, now, ARGV[1]
  redis.call('HSET', KEYS[1], 'floor', text(floor), 'made', text(made), 'epoch', epoch)
elseif math.abs(now - made) >= half then
  -- When the clock was set back, the floor rises above what was given out since.
  floor = now > floor and now or floor + half
  redis.call('HSET', KEYS[1], 'floor', text(floor), 'made', text(now))
end
return {text(floor), epoch}
"""
)
"""Give the floor and the epoch; make them where there are none, renew an old floor.

Arguments: a new epoch, half of TOKEN_MAX_AGE in microseconds.
"""

LEASE = Script(
    _COMMON
    + """
local known = redis.call('HMGET', KEYS[1], 'generation', 'run', 'made')
local generation, this_run, now = known[1], run(), micros()
local valid = generation and generation == ARGV[1] and known[2] == this_run
local young = valid and math.abs(now - known[3]) < tonumber(ARGV[4])
if not young then
  if not valid then generation = ARGV[2] end
  redis.call('HSET', KEYS[1], 'generation', generation, 'run', this_run, 'made', text(now))
end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return {generation, young and 1 or 0}
"""
)
"""Renew a process's lease; give its generation, and 1 if what it wrote before is all there.

Arguments: the generation that the process knows, a new one, milliseconds until the lease
expires, microseconds after which everything must be written again.
"""

FORGET = Script(
    """
for at = 1, #ARGV, 2 do
  if redis.call('HGET', KEYS[1], ARGV[at]) == ARGV[at + 1] then
    redis.call('HDEL', KEYS[1], ARGV[at])
  end
end
return 0
"""
)
"""Remove the fields that still hold these values. Arguments: field, value, field, ..."""
