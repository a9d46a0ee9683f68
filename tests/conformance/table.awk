# Makes the table of a conformance run. First file: the expected misses, `SUITE<tab>TEST<tab>REASON`; second: the results,
# `SUITE<tab>TEST<tab>RUNTIME<tab>RESULT<tab>DETAIL`. Ends with code 1 if bulkhead misses what runc passes and nobody expected it.
FNR == NR {
  if ($0 !~ /^#/ && NF >= 2) expected[$1 "\t" $2] = 1
  next
}
{
  test = $1 "\t" $2
  if (!(test in seen)) { seen[test] = 1; order[++tests] = test }
  result[test, $3] = $4
  detail[test, $3] = $5
}
function cell(test, runtime) {
  if (!((test, runtime) in result)) return "-"
  return result[test, runtime] (detail[test, runtime] == "" ? "" : " (" detail[test, runtime] ")")
}
END {
  runtimes[1] = "runc"; runtimes[2] = "bulkhead"
  for (i = 1; i <= tests; i++) {
    test = order[i]
    split(test, part, "\t")
    if (part[1] != suite) {
      suite = part[1]
      suites[++suite_count] = suite
      printf "\n%s | runc | bulkhead\n--- | --- | ---\n", suite
    }
    miss = result[test, "runc"] == "pass" && result[test, "bulkhead"] != "pass"
    printf "%s | %s | %s\n", part[2], cell(test, "runc"), cell(test, "bulkhead") (miss ? (test in expected ? ", expected" : " <== MISS") : "")
    for (j = 1; j <= 2; j++) count[suite, runtimes[j], result[test, runtimes[j]]]++
    if (miss && !(test in expected)) misses++
    if (!miss && test in expected) printf "    (listed as a miss, and is none: take it off the list)\n"
    if (result[test, "bulkhead"] == "pass" && result[test, "runc"] != "pass") ahead++
  }
  print ""
  for (i = 1; i <= suite_count; i++)
    for (j = 1; j <= 2; j++)
      printf "%s under %s: %d pass, %d fail, %d skip\n", suites[i], runtimes[j], count[suites[i], runtimes[j], "pass"], \
        count[suites[i], runtimes[j], "fail"], count[suites[i], runtimes[j], "skip"]
  printf "passed by bulkhead and not by runc: %d; passed by runc and unexpectedly not by bulkhead: %d\n", ahead, misses
  exit (misses > 0 || tests == 0)
}
