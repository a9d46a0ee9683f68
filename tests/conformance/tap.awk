# Judges what a TAP producer wrote; `code` is how it ended. Prints `RESULT<tab>DETAIL`. A test that is all skipped is a skip; a producer that
# did not end well or did not keep to its plan is a failure (https://testanything.org). The tests of hooks plan nothing (`1..0`), and say in a YAML
# block what went wrong, if anything did; those of refusals say nothing at all when all is well.
/^1\.\.[0-9]+/ { nothing = /# *SKIP/; sub(/^1\.\./, ""); plan = $1 + 0; planned = 1; next }
/^Bail out!/ { bad++; next }
/^ok( |$).*# *SKIP/ { skipped++; next }
/^ok( |$)/ { good++; next }
/^not ok( |$).*# *TODO/ { good++; next }
/^not ok( |$)/ { bad++ }
/^ *"error": *"[^"]/ { complaint = 1 }
END {
  all = good + bad + skipped
  if (code == 124 || code == 137) print "fail\ttime limit"
  else if (bad) printf "fail\t%d of %d\n", bad, all
  else if (code) printf "fail\texit code %d\n", code
  else if (planned ? plan != all : all) printf "fail\t%d of %d ran\n", all, plan
  else if (good) print "pass\t"
  else if (skipped || nothing) print "skip\t"
  else if (complaint) print "fail\t"
  else print "pass\t"
}
