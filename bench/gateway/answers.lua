-- For wrk: sends one request again and again, and counts as lost every answer that is not whole.
--
--   REQUEST=file HEADERS=file wrk … -s answers.lua URL -- LENGTH END
--
-- A whole answer has the status 200, a body of LENGTH bytes, and END as its last bytes. The result is one line of JSON.

local threads = {}

function setup(thread)
  table.insert(threads, thread)
end

function init(arguments)
  local file = assert(io.open(os.getenv("REQUEST"), "rb"))
  wrk.method = "POST"
  wrk.body = file:read("*a")
  file:close()
  for line in io.lines(os.getenv("HEADERS")) do
    local name, value = line:match("^(.-): (.*)$")
    wrk.headers[name] = value
  end
  length, ending = tonumber(arguments[1]), arguments[2]:gsub("\\n", "\n")
  request_bytes = wrk.format()
  whole, lost, problem = 0, 0, ""
end

function request()
  return request_bytes
end

function response(status, headers, body)
  if status == 200 and #body == length and body:sub(-#ending) == ending then
    whole = whole + 1
    return
  end
  lost = lost + 1
  problem = "status " .. status .. ", " .. #body .. " bytes instead of " .. length
end

function done(summary, latency, requests)
  local whole, lost, problem = 0, 0, ""
  for _, thread in ipairs(threads) do
    whole, lost = whole + thread:get("whole"), lost + thread:get("lost")
    problem = thread:get("problem") ~= "" and thread:get("problem") or problem
  end
  local errors = summary.errors
  local broken = errors.connect + errors.read + errors.write + errors.timeout
  if broken > 0 then
    problem = problem .. " " .. broken .. " connections broke"
  end
  io.write(string.format(
    '\n{"seconds":%.6f,"whole":%d,"lost":%d,"problem":"%s","p50_ms":%.4f,"p99_ms":%.4f}\n',
    summary.duration / 1e6, whole, lost + broken, problem, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3
  ))
end
