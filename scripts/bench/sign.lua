-- For wrk: posts the sign bodies of a file (first argument, one a line) in turn, with the token in BENCH_TOKEN, and
-- prints one line of JSON at the end. Requests are put together before the clock starts.
local requests = {}
local at = 0

function init(args)
    local headers = {["Content-Type"] = "application/json", ["X-Vault-Token"] = os.getenv("BENCH_TOKEN")}
    for body in io.lines(args[1]) do
        requests[#requests + 1] = wrk.format("POST", nil, headers, body)
    end
end

function request()
    at = at % #requests + 1
    return requests[at]
end

function done(summary, latency)
    local e = summary.errors
    io.write(string.format(
        'BENCH {"answers": %d, "errors": %d, "us": %d, "p50_us": %d, "p99_us": %d}\n',
        summary.requests, e.connect + e.read + e.write + e.status + e.timeout, summary.duration,
        latency:percentile(50), latency:percentile(99)
    ))
end
