"""The Lua scripts that the Redis history runs inside the server. Each script is atomic.

A script uses the keys of one token, or one key of the history, and receives all of them as
arguments, so that it also runs on a cluster. Outside of a cluster, an append also writes to the
log of changes. The scripts format numbers with ``%.0f``, because
Lua would write a number of 16 digits as ``1.7e+15``.

An entry of the stream has the fields ``m`` (its time in microseconds, and the lengths of its
action, data, kind and own id) and ``e`` (these four, one after the other). The first entry of an
epoch or of a server's run also has ``p``, the position that it follows. The last entry of an
append, and each entry with a key, ends with ``r``, the reference of the append. Before it, an
event with a key has ``k``, the key.

An entry of the log of changes has one field, the token of an append, with the last sequence
number of the append as its value.
"""

import hashlib


class Script:
    """A Lua script, and the hash by which the server caches it."""

    def __init__(self, source: str) -> None:
        self.source = source
        # EVALSHA requires a SHA-1 hash. It is not used for security.
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
-- A server that was restarted, or that replaced another one, has a new run id. It may have
-- lost its last writes.
local function run()
  local info = redis.call('INFO', 'server')
  -- A plain search, which takes half of the time of one for a pattern.
  local _, before = string.find(info, 'run_id:', 1, true)
  return before and string.match(info, '^%w+', before + 1) or ''
end
"""

_STORED = """
local function own_id(entry)
  local length = tonumber(string.match(entry[2][2], '%d+$'))
  return length > 0 and string.sub(entry[2][4], -length) or ''
end
local function stored(events, keys, key, ref)
  local seq = redis.call('HGET', keys, key)
  local entry = seq and redis.call('XRANGE', events, seq, seq)[1]
  if not entry then return false end
  if entry[2][#entry[2]] == ref then return seq end
  return seq .. ' ' .. own_id(entry)
end
"""
"""``stored`` looks for an event with a key. It returns false if there is none, otherwise the
sequence number. If the event is not of the append with the reference, a space and the own id or
``""`` follow."""

NOW = Script(
    _COMMON
    + """
return text(micros())
"""
)
"""Return the clock of the server with the key, in microseconds."""

APPEND = Script(
    _COMMON
    + _STORED
    + """
local head, events, ids, marker, keys, log = unpack(KEYS)
local ref, token = ARGV[1], ARGV[2]
-- The times of the bounds are in milliseconds. ``since`` is a time before the first attempt, in
-- microseconds, or 0.
local max_events, max_bytes, max_age, token_max_age, floor, since =
  string.match(ARGV[3], '^(%d+) (%d+) (%d+) (%d+) (%d+) (%d+)$')
max_events, max_bytes, since = tonumber(max_events), tonumber(max_bytes), tonumber(since)
local events_given = (#ARGV - 3) / 3
-- Either all events have a key, or none.
local with_keys = ARGV[6] ~= ''

-- This attempt arrived after a later one that succeeded.
local done = redis.call('GET', marker)
if done then return done end

local now = micros()
if since > 0 then
  -- An earlier attempt may have succeeded although its response was lost.
  local at = '+'
  while at do
    local some = redis.call('XREVRANGE', events, at, '-', 'COUNT', 50)
    at = nil
    for _, entry in ipairs(some) do
      local seq = string.match(entry[1], '^%d+')
      local fields = entry[2]
      -- The last entry of an append has the reference, because it is trimmed last.
      if fields[#fields - 1] == 'r' and fields[#fields] == ref then
        return text(seq - events_given + 1)
      end
      if created(entry) < since then at = nil break end
      at = text(seq - 1)
    end
  end
end

local known = redis.call('HMGET', head, 'last', 'run', 'bytes', 'closed', 'oldest')
local last, closed, this_run = tonumber(known[1]), known[4], run()

local results, new = {}, events_given
if with_keys and last then
  for n = 1, events_given do
    results[n] = stored(events, keys, ARGV[3 + 3 * n], ref)
    if results[n] then new = new - 1 end
  end
end
local function finish(result)
  if since > 0 then redis.call('SET', marker, result, 'PX', 600000) end
  return result
end
if new == 0 then return finish(table.concat(results, '\\n')) end

local seq, before
if not last then
  if floor == '0' then return false end
  -- The server may have evicted only the head. (A server without free memory refuses a script
  -- at its first write, unless that is a DEL.)
  if redis.call('EXISTS', events, ids, keys) > 0 then redis.call('DEL', events, ids, keys) end
  before, seq = floor, math.max(now, floor + 1)
elseif known[2] ~= this_run then
  -- Sequence numbers above the last one may have been assigned before writes were lost, so
  -- they are skipped. The distance matters only if the clock was set back.
  before, seq = text(last), math.max(now, last + 1000000000)
else
  seq = last + 1
end
local first, newest, time = nil, nil, text(now)
-- All events may have expired before the head.
local length = redis.call('XLEN', events)
local bytes = length > 0 and tonumber(known[3]) or 0
-- When the oldest event was stored. An earlier version of the script has not written it.
local oldest = length == 0 and time or known[5]

local own_ids = false
for n = 1, events_given do
  if not results[n] then
    local at = 1 + 3 * n
    local lengths, texts = ARGV[at], ARGV[at + 1]
    local entry = {'m', time .. ' ' .. lengths, 'e', texts}
    local action_length, data_length, kind_length = string.match(lengths, '^(%d+) (%d+) (%d+)')
    local kind_at = action_length + data_length + 1
    local own_at = kind_at + kind_length
    local kind, own = string.sub(texts, kind_at, own_at - 1), string.sub(texts, own_at)
    newest = text(seq)
    if not first then
      first = newest
      if before then entry[5], entry[6] = 'p', before end
    end
    if with_keys then
      entry[#entry + 1] = 'k'
      entry[#entry + 1] = ARGV[at + 2]
    end
    if with_keys or n == events_given then
      entry[#entry + 1] = 'r'
      entry[#entry + 1] = ref
    end
    redis.call('XADD', events, newest .. '-0', unpack(entry))
    if with_keys then
      results[n] = newest
      redis.call('HSET', keys, ARGV[at + 2], results[n])
    end
    if own ~= '' then
      redis.call('HSETNX', ids, own, newest)
      own_ids = true
    end
    if kind == 'close' then
      if closed then redis.call('HSET', head, 'closed_before', closed) end
      closed = newest
      redis.call('HSET', head, 'closed', closed)
    elseif kind == 'whole' then
      redis.call('HSET', head, 'whole', newest)
    end
    bytes = bytes + data_length
    seq = seq + 1
  end
end
length = length + new

-- Trim events beyond the bounds. Entries are read in growing batches, because in most cases
-- there is one to remove.
local batch, oldest_kept = 1, now - max_age * 1000
local full = not oldest or length > max_events or bytes > max_bytes
  or tonumber(oldest) < oldest_kept
while full do
  local some = redis.call('XRANGE', events, '-', '+', 'COUNT', batch)
  local gone = 0
  for _, entry in ipairs(some) do
    local kept = length - gone
    local seq, fields = string.match(entry[1], '^%d+'), entry[2]
    oldest = string.match(fields[2], '^%d+')
    if kept <= max_events and (bytes <= max_bytes or kept == 1)
      and tonumber(oldest) >= oldest_kept then
      break
    end
    local own = own_id(entry)
    if own ~= '' and redis.call('HGET', ids, own) == seq then redis.call('HDEL', ids, own) end
    local old = fields[#fields - 3] == 'k' and fields[#fields - 2]
    if old and redis.call('HGET', keys, old) == seq then redis.call('HDEL', keys, old) end
    bytes = bytes - string.match(fields[2], '^%d+ %d+ (%d+)')
    gone = gone + 1
  end
  if gone > 0 then
    length = length - gone
    redis.call('XTRIM', events, 'MAXLEN', length)
  end
  if gone < batch then break end
  batch = math.min(batch * 2, 100)
end
redis.call('HSET', head, 'last', newest, 'run', this_run, 'bytes', text(bytes), 'oldest', oldest)
redis.call('PEXPIRE', head, token_max_age)
redis.call('PEXPIRE', events, max_age)
if own_ids then redis.call('PEXPIRE', ids, max_age) end
if with_keys then redis.call('PEXPIRE', keys, max_age) end
if log then
  redis.call('XADD', log, 'MAXLEN', '~', 1000, '*', token, newest)
end
return finish(with_keys and table.concat(results, '\\n') or first)
"""
)
"""Append events once, also if several attempts arrive, in any order.

Returns the first sequence number, or nil if the token has no epoch and the floor was not passed.
If the events have keys, stores those whose key no event of the token has, and returns a line for
each event, as ``stored`` does.

Keys: head, events, own ids, marker of the append, the sequence numbers of events by their keys,
and the log of changes, unless the server is a cluster. Arguments: the reference of the append;
the token; six numbers with spaces between them: MAX_EVENTS, MAX_BYTES, MAX_AGE and TOKEN_MAX_AGE
in milliseconds, the floor or 0, and a time before the first attempt, in microseconds, or 0 in the
first attempt; then for each event the lengths of its action, data, kind and own id, with spaces
between them; these four, one after the other; and its key or ``""``. There are few arguments,
because a client takes longer to encode many small ones.
Several events with a key have no attempt other than a first one, because their keys are enough.
"""

STORED = Script(
    _STORED
    + """
local results = {}
for at = 1, #ARGV, 2 do
  results[#results + 1] = stored(KEYS[1], KEYS[2], ARGV[at], ARGV[at + 1]) or ''
end
return table.concat(results, '\\n')
"""
)
"""Find events by their keys.

Returns a line for each, as ``stored`` does, and an empty one for an event that is not stored.

Keys: events, and the sequence numbers of events by their keys. Arguments: for each event its key
and the reference of its append.
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
"""Read events up to a number of events and of bytes.

Returns nil if the token has no epoch. Otherwise it returns the last sequence number, that of the
last close, and the position that the first event follows if that is not the sequence number
before its own. The events follow in two strings, because a client takes far longer to read many
small ones. The first string contains for each event its sequence number, its time and the lengths
of its action, data, kind and own id. The second string contains these four of all events, one
after the other.

Keys: head, events. Arguments: the first sequence number to read, the bounds of events and bytes.
"""

FIND = Script(
    """
local head, events, ids = KEYS[1], KEYS[2], KEYS[3]
local known = redis.call('HMGET', head, 'last', 'closed')
if not known[1] then return false end
local position, kind, complete = redis.call('HGET', ids, ARGV[1]) or ARGV[2], false, 0
if position == '' then return {known[1], known[2], false, false, 0} end
for _, entry in ipairs(redis.call('XRANGE', events, position, position)) do
  local action, data, length = string.match(entry[2][2], '^%d+ (%d+) (%d+) (%d+)')
  kind = string.sub(entry[2][4], action + data + 1, action + data + length)
end
if position == known[1] then complete = 1 end
local after = string.format('%.0f', position + 1)
for _, entry in ipairs(redis.call('XRANGE', events, after, '+', 'COUNT', 1)) do
  local seq, fields = string.match(entry[1], '^%d+'), entry[2]
  -- The first event of an epoch or of a server's run contains the position it follows.
  if seq == after or (fields[5] == 'p' and fields[6] == position) then complete = 1 end
end
return {known[1], known[2], position, kind, complete}
"""
)
"""Find the position that a cursor names.

Returns nil if the token has no epoch. Otherwise it returns the last sequence number, that of the
last close, the position, the kind of the event at the position, and 1 if all events after it are
kept.

Keys: head, events, own ids. Arguments: the cursor; the sequence number in it, or ``""``.
"""

REWIND = Script(
    _COMMON
    + """
local head, events = KEYS[1], KEYS[2]
local max_events, max_age = tonumber(ARGV[1]), ARGV[2]
local known = redis.call('HMGET', head, 'last', 'closed', 'closed_before', 'whole')
local last = known[1]
if not last then return false end
local function first_from(start)
  return redis.call('XRANGE', events, start, '+', 'COUNT', 1)[1]
end
local function number(entry)
  return tonumber(string.match(entry[1], '^%d+'))
end
local function position_before(entry)
  local fields = entry[2]
  return fields[5] == 'p' and fields[6] or text(number(entry) - 1)
end

-- A stream ends at a close, unless that is the newest event.
local close = known[2] ~= last and known[2] or known[3]
local start = math.max(close and close + 1 or 0, known[4] or 0)
local entry = first_from(text(start))
if not entry then return last end
local first = number(entry)

-- Each server's run has consecutive numbers, and its first entry contains the last number of the
-- run before. So one entry of each run is read.
local run_end, wanted, oldest = last, max_events, nil
repeat
  entry = first_from(text(math.max(first, run_end - wanted + 1)))
  oldest = number(entry)
  -- At least 1, so that the loop ends although entries were deleted by hand.
  wanted = wanted - math.max(run_end - oldest + 1, 1)
  run_end = position_before(entry)
until wanted <= 0 or oldest == first

if max_age ~= '' then
  local since, high = micros() - max_age, last + 1
  while oldest < high do
    local middle = math.floor((oldest + high) / 2)
    entry = first_from(text(middle))
    if created(entry) < since then oldest = number(entry) + 1 else high = middle end
  end
  entry = first_from(text(oldest))
  if not entry then return last end
end
return position_before(entry)
"""
)
"""Find the position before the oldest of the newest events.

Returns nil if the token has no epoch, and the last sequence number if there is no such event. The
number of entries that it reads grows with the logarithm of the number of events.

Keys: head, events. Arguments: the most events; microseconds of the greatest age, or ``""``.
"""

FLOOR = Script(
    _COMMON
    + """
local known = redis.call('HMGET', KEYS[1], 'floor', 'made', 'generation')
local floor, made, generation = tonumber(known[1]), tonumber(known[2]), known[3]
local now, half = micros(), tonumber(ARGV[2])
if not (floor and made and generation) then
  floor, made, generation = now, now, ARGV[1]
  redis.call('HSET', KEYS[1], 'floor', text(floor), 'made', text(made), 'generation', generation)
elseif math.abs(now - made) >= half then
  -- If the clock was set back, the floor still rises above all sequence numbers assigned since.
  floor = now > floor and now or floor + half
  redis.call('HSET', KEYS[1], 'floor', text(floor), 'made', text(now))
end
return {text(floor), generation}
"""
)
"""Return the floor and the generation of the store.

It creates both in an empty store, and renews a floor that is older than half of TOKEN_MAX_AGE.

Key: the floor. Arguments: a new generation, half of TOKEN_MAX_AGE in microseconds.
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
"""Renew the lease of a process.

Returns the generation of the lease, and 1 if all listeners that the process announced before are
still stored.

Key: the lease. Arguments: the generation that the process has stored, a new one, milliseconds
until the lease expires, microseconds after which all listeners must be announced again.
"""

REMOVE = Script(
    """
for at = 1, #ARGV, 2 do
  if redis.call('HGET', KEYS[1], ARGV[at]) == ARGV[at + 1] then
    redis.call('HDEL', KEYS[1], ARGV[at])
  end
end
return 0
"""
)
"""Remove the fields of a hash that still have these values.

Key: the hash. Arguments: field, value, field, value, ...
"""
