//! `bulkhead check`: one line per finding.

use bulkhead_runtime::check::findings;
use bulkhead_runtime::config::Config;

/// Prints the findings; the exit code is 0 when guests can run here.
pub fn check(config: &Config) -> i32 {
    let mut code = 0;
    for finding in findings(config) {
        match &finding.result {
            Ok(detail) => println!("ok    {}: {detail}", finding.what),
            Err(problem) => {
                println!("FAIL  {}: {problem}", finding.what);
                code = super::FAILURE;
            }
        }
    }
    code
}
