-- What server processes and queens count together. One script, so that every step is taken at once or not at all.
--
-- ARGV[1]: a JSON array of operation, clock (empty: the server's own), epoch, process, then what the operation takes.
-- rbee:epoch            what this server has kept since; another one means that it has lost everything
-- rbee:token            by which queens know each other's requests
-- rbee:alive            processes, by when their lease ends
-- rbee:account:ID       what an identity has used, holds and has left
-- rbee:held:PROCESS     its running jobs: number -> "tokens identity"
-- rbee:last:PROCESS     the number of its last operation that was taken; an operation that comes twice counts once

local PREFIX = 'rbee:'
local MONTH_S = 40 * 86400
local LAST_S = 86400
local COUNTS = {'day_requests', 'day_tokens', 'month_requests', 'month_tokens'}

local args = cjson.decode(ARGV[1])
local operation, clock, epoch, process = args[1], args[2], args[3], args[4]

local function now()
    if clock ~= '' then return tonumber(clock) end
    local time = redis.call('TIME')
    return tonumber(time[1]) + tonumber(time[2]) / 1000000
end

local function text(number)
    return string.format('%.17g', number)
end

local function account_of(identity)
    local flat, found = redis.call('HGETALL', PREFIX .. 'account:' .. identity), {}
    for index = 1, #flat, 2 do found[flat[index]] = tonumber(flat[index + 1]) end
    for _, name in ipairs({'in_flight', 'reserved', 'day', 'month', unpack(COUNTS)}) do
        found[name] = found[name] or 0
    end
    return found
end

local function save(identity, account)
    local flat = {}
    for name, value in pairs(account) do
        flat[#flat + 1] = name
        flat[#flat + 1] = text(value)
    end
    redis.call('HSET', PREFIX .. 'account:' .. identity, unpack(flat))
    redis.call('EXPIRE', PREFIX .. 'account:' .. identity, MONTH_S)
end

-- Begin a new day or month. A clock that is set back must not give a budget anew.
local function turn(account, day, month)
    if day > account.day then
        account.day, account.day_requests, account.day_tokens = day, 0, 0
        account.seen_day_requests, account.seen_day_tokens = 0, 0
    end
    if month > account.month then
        account.month, account.month_requests, account.month_tokens = month, 0, 0
        account.seen_month_requests, account.seen_month_tokens = 0, 0
    end
end

-- Return what is left of one minute's worth.
local function fill(account, name, per_minute, at)
    if per_minute <= 0 then return nil end
    local left, since = account[name .. '_left'], account[name .. '_at']
    if left == nil then
        left = per_minute
    else
        left = math.min(per_minute, left + (at - since) * per_minute / 60)
    end
    account[name .. '_left'], account[name .. '_at'] = left, at
    return left
end

local function take(account, name, count)
    local left = account[name .. '_left']
    if left ~= nil then account[name .. '_left'] = left - count end
end

local function state(taken, account)
    local told = {taken}
    for _, name in ipairs({'in_flight', 'reserved', 'requests_left', 'tokens_left', 'day', 'month', unpack(COUNTS)}) do
        told[#told + 1] = account[name] and text(account[name]) or 'nan'
    end
    return table.concat(told, ' ')
end

local function is_new(number)
    local last = tonumber(redis.call('GET', PREFIX .. 'last:' .. process) or '-1')
    return number > last
end

local function note(number)
    redis.call('SET', PREFIX .. 'last:' .. process, number, 'EX', LAST_S)
end

local function give_back(dead)
    local held = redis.call('HGETALL', PREFIX .. 'held:' .. dead)
    for index = 2, #held, 2 do
        local tokens, identity = string.match(held[index], '^(%d+) (.*)$')
        local account = account_of(identity)
        account.in_flight = math.max(0, account.in_flight - 1)
        account.reserved = math.max(0, account.reserved - tonumber(tokens))
        take(account, 'tokens', -tonumber(tokens))
        save(identity, account)
    end
    redis.call('DEL', PREFIX .. 'held:' .. dead)
    redis.call('ZREM', PREFIX .. 'alive', dead)
    return #held / 2
end

local function exceeds(account, tokens, limits)
    if limits.concurrency > 0 and account.in_flight >= limits.concurrency then return true end
    local wanted = account.reserved + tokens
    local more = {day_requests = 1, day_tokens = wanted, month_requests = 1, month_tokens = wanted}
    for _, name in ipairs(COUNTS) do
        if limits[name] > 0 and account[name] + more[name] > limits[name] then return true end
    end
    for name, count in pairs({requests = 1, tokens = tokens}) do
        local limit = limits[name]
        if limit > 0 and math.min(count, limit) > account[name .. '_left'] then return true end
    end
    return false
end

-- identity, day, month, the limits, from args[at] on
local function subject(at)
    local limits = {}
    for index, name in ipairs({'requests', 'tokens', 'concurrency', unpack(COUNTS)}) do
        limits[name] = tonumber(args[at + 2 + index])
    end
    local account, time = account_of(args[at]), now()
    turn(account, tonumber(args[at + 1]), tonumber(args[at + 2]))
    fill(account, 'requests', limits.requests, time)
    fill(account, 'tokens', limits.tokens, time)
    return args[at], account, limits
end

-- operation's number, forced, counted, job's number, tokens, subject
local function enter()
    local number, forced, counted, job, tokens = tonumber(args[5]), args[6] == 1, args[7] == 1, args[8], tonumber(args[9])
    local identity, account, limits = subject(10)
    local held = PREFIX .. 'held:' .. process
    if not is_new(number) or redis.call('HEXISTS', held, job) == 1 then return state(1, account) end
    if not forced and exceeds(account, tokens, limits) then return state(0, account) end
    if counted then
        account.day_requests, account.month_requests = account.day_requests + 1, account.month_requests + 1
        take(account, 'requests', 1)
    end
    take(account, 'tokens', tokens)
    account.in_flight, account.reserved = account.in_flight + 1, account.reserved + tokens
    save(identity, account)
    redis.call('HSET', held, job, string.format('%d %s', tokens, identity))
    note(number)
    return state(1, account)
end

-- operation's number, job's number, tokens used, subject
local function settle()
    local number, job, used = tonumber(args[5]), args[6], tonumber(args[7])
    local identity, account = subject(8)
    if not is_new(number) then return state(1, account) end
    local held = redis.call('HGET', PREFIX .. 'held:' .. process, job)
    if held then
        local tokens = tonumber(string.match(held, '^%d+'))
        redis.call('HDEL', PREFIX .. 'held:' .. process, job)
        account.in_flight = math.max(0, account.in_flight - 1)
        account.reserved = math.max(0, account.reserved - tokens)
        take(account, 'tokens', -tokens)
    end
    take(account, 'tokens', used)
    account.day_tokens, account.month_tokens = account.day_tokens + used, account.month_tokens + used
    save(identity, account)
    note(number)
    return state(1, account)
end

-- operation's number, requests, tokens, subject: what a process counted while it could not reach this server
local function merge()
    local number, requests, tokens = tonumber(args[5]), tonumber(args[6]), tonumber(args[7])
    local identity, account = subject(8)
    if is_new(number) then
        account.day_requests, account.month_requests = account.day_requests + requests, account.month_requests + requests
        account.day_tokens, account.month_tokens = account.day_tokens + tokens, account.month_tokens + tokens
        take(account, 'requests', requests)
        take(account, 'tokens', tokens)
        save(identity, account)
        note(number)
    end
    return state(1, account)
end

-- identity, day, month, the four counts: what a process last knew of a server that has lost everything. Processes knew
-- more and less; the most of it counts, and what each counted by itself since is merged on top.
local function remind()
    local identity, day, month = args[5], tonumber(args[6]), tonumber(args[7])
    local account = account_of(identity)
    turn(account, day, month)
    local same = {day = day == account.day, month = month == account.month}
    for index, name in ipairs(COUNTS) do
        local seen, told = account['seen_' .. name] or 0, tonumber(args[7 + index])
        if same[string.match(name, '^%a+')] and told > seen then
            account[name] = account[name] + told - seen
            account['seen_' .. name] = told
        end
    end
    save(identity, account)
    return 1
end

-- lease in seconds
local function beat()
    local time = now()
    local known = redis.call('ZSCORE', PREFIX .. 'alive', process)
    redis.call('ZADD', PREFIX .. 'alive', time + tonumber(args[5]), process)
    local given_back = 0
    for _, dead in ipairs(redis.call('ZRANGEBYSCORE', PREFIX .. 'alive', '-inf', time)) do
        given_back = given_back + give_back(dead)
    end
    return {known and 1 or 0, given_back}
end

-- epoch and token if there are none, lease, who this process comes after (what its name begins with)
local function join()
    redis.call('SET', PREFIX .. 'epoch', epoch, 'NX')
    redis.call('SET', PREFIX .. 'token', args[5], 'NX')
    for _, other in ipairs(redis.call('ZRANGE', PREFIX .. 'alive', 0, -1)) do
        -- Its slot was free, so it is dead.
        if other ~= process and string.sub(other, 1, string.len(args[7])) == args[7] then give_back(other) end
    end
    redis.call('ZADD', PREFIX .. 'alive', now() + tonumber(args[6]), process)
    return {redis.call('GET', PREFIX .. 'epoch'), redis.call('GET', PREFIX .. 'token')}
end

if operation == 'join' then return join() end
if redis.call('GET', PREFIX .. 'epoch') ~= epoch then return redis.error_reply('EPOCH is another') end
local operations = {enter = enter, settle = settle, merge = merge, remind = remind, beat = beat}
return operations[operation]()
