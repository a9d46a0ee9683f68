//! Says whether this host's `/dev/kvm` can run guests: exit code 0 if it can.

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    match bulkhead_vmm::probe::probe(Path::new("/dev/kvm")) {
        Ok(report) => {
            println!(
                "ok: a loop of two million instructions took {:?}",
                report.loop_time
            );
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("{error}; {}", error.remedy());
            ExitCode::FAILURE
        }
    }
}
