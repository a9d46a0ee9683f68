//! What an idle sandbox costs in memory, and how large the files are.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use bulkhead_e2e::{dist, processes};

use crate::idle::{GUEST_MIB, IdleSandbox};
use crate::table::{median, print};

/// Starts idle sandboxes and prints the proportional set size (PSS) of each process, guest memory apart.
pub fn measure(rounds: usize) -> anyhow::Result<()> {
    let mut sizes: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for _ in 0..rounds {
        let sandbox = IdleSandbox::start()?;
        for &pid in &sandbox.pids {
            let name = processes::comm(&format!("/proc/{pid}"))?;
            let pss = Pss::of(&fs::read_to_string(format!("/proc/{pid}/smaps"))?);
            let mut add = |what, kib| sizes.entry(what).or_default().push(kib as f64);
            add(format!("{name}, without guest memory"), pss.own_kib);
            if pss.guest_kib > 0 {
                add("guest memory touched".to_owned(), pss.guest_kib);
            }
        }
    }
    let rows: Vec<_> = sizes
        .iter()
        .map(|(what, kib)| vec![what.clone(), format!("{:.1} MiB", median(kib) / 1024.0)])
        .collect();
    print(
        &format!(
            "Memory (PSS) of an idle sandbox with a guest of {GUEST_MIB} MiB, median of {rounds}"
        ),
        &["what", "size"],
        &rows,
    );
    Ok(())
}

/// A process's memory in its share of all that it maps.
#[derive(Debug, Default, PartialEq, Eq)]
struct Pss {
    guest_kib: u64,
    own_kib: u64,
}

impl Pss {
    /// Adds `/proc/<pid>/smaps` up. Guest memory are the writable private mappings that the VMM has excluded from core dumps (`dd`
    /// among the flags, which come last for each mapping): nothing else of it is.
    fn of(smaps: &str) -> Self {
        let mut sum = Self::default();
        let (mut writable, mut kib) = (false, 0);
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            match (words.next(), words.next()) {
                (Some("Pss:"), Some(size)) => kib = size.parse().unwrap_or(0),
                (Some("VmFlags:"), first) => {
                    let excluded = first.into_iter().chain(words).any(|flag| flag == "dd");
                    if excluded && writable {
                        sum.guest_kib += kib;
                    } else {
                        sum.own_kib += kib;
                    }
                }
                (Some(range), Some(rights)) if !range.ends_with(':') => {
                    writable = rights == "rw-p";
                }
                _ => {}
            }
        }
        sum
    }
}

/// Prints the sizes of what is installed.
pub fn sizes() -> anyhow::Result<()> {
    let mut rows = Vec::new();
    for folder in ["bin", "lib/bulkhead"] {
        let mut entries: Vec<_> = fs::read_dir(dist().join(folder))?.collect::<Result<_, _>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            rows.push(vec![
                Path::new(folder)
                    .join(entry.file_name())
                    .display()
                    .to_string(),
                format!(
                    "{:.1} MiB",
                    entry.metadata()?.len() as f64 / f64::from(1 << 20)
                ),
            ]);
        }
    }
    print("Sizes of the files", &["file", "size"], &rows);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::Pss;

    #[test]
    fn guest_memory_is_what_no_core_dump_has_however_many_mappings_it_is() {
        let smaps = "\
7f0000000000-7f0000200000 rw-p 00000000 00:00 0
Size:               2048 kB
Pss:                1000 kB
VmFlags: rd wr mr mw me nr dd nh
7f0000200000-7f0008000000 rw-p 00000000 00:00 0
Pss:               40000 kB
VmFlags: rd wr mr mw me nr dd
7f0009000000-7f0009010000 rw-p 00000000 00:00 0                          [heap]
Pss:                  30 kB
VmFlags: rd wr mr mw me ac
7f000a000000-7f000a010000 r-xp 00000000 00:10 7 /bin/program: with words
Pss:                   7 kB
VmFlags: rd ex mr mw me
7ffd00000000-7ffd00004000 r--p 00000000 00:00 0                          [vvar]
Pss:                   1 kB
VmFlags: rd mr pf io de dd
";
        let expected = Pss {
            guest_kib: 41000,
            own_kib: 38,
        };
        assert_eq!(Pss::of(smaps), expected);
    }
}
