//! What a cgroup has used, as the API has it.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use bulkhead_protocol::agent::{
    ContainerStatsResponse, HugetlbStats, IoStats, Pressure, PressureLine,
};

use super::files::{flat_keyed, nested_keyed, number, read};
use crate::error::{Context, Result};

/// Reads the figures of the cgroup at `path`.
pub(super) fn of(path: &Path) -> Result<ContainerStatsResponse> {
    let text = |file: &str| read(&path.join(file)).what(|| format!("cannot read {file}"));
    let flat = |file: &str| -> Result<HashMap<String, u64>> {
        Ok(text(file)?.as_deref().map(flat_keyed).unwrap_or_default())
    };
    let single = |file: &str| -> Result<u64> {
        Ok(text(file)?.as_deref().and_then(number).unwrap_or_default())
    };
    let pressures =
        |file: &str| -> Result<Option<Pressure>> { Ok(text(file)?.as_deref().map(pressure)) };
    let mut hugetlb = Vec::new();
    for size in page_sizes(path)? {
        hugetlb.push(HugetlbStats {
            current: single(&format!("hugetlb.{size}.current"))?,
            max: single(&format!("hugetlb.{size}.max"))?,
            failed: flat(&format!("hugetlb.{size}.events"))?
                .remove("max")
                .unwrap_or_default(),
            page_size: size,
            ..Default::default()
        });
    }
    Ok(ContainerStatsResponse {
        cpu: flat("cpu.stat")?,
        memory: flat("memory.stat")?,
        memory_current: single("memory.current")?,
        memory_max: single("memory.max")?,
        memory_peak: single("memory.peak")?,
        swap_current: single("memory.swap.current")?,
        swap_max: single("memory.swap.max")?,
        memory_events: flat("memory.events")?,
        pids_current: single("pids.current")?,
        pids_max: single("pids.max")?,
        io: text("io.stat")?
            .as_deref()
            .map(io_stats)
            .unwrap_or_default(),
        hugetlb,
        cpu_pressure: pressures("cpu.pressure")?.into(),
        memory_pressure: pressures("memory.pressure")?.into(),
        io_pressure: pressures("io.pressure")?.into(),
        ..Default::default()
    })
}

/// The sizes of huge pages that it has limits for, as its files name them.
fn page_sizes(path: &Path) -> Result<Vec<String>> {
    let what = || "cannot list the container's cgroup";
    let mut sizes = Vec::new();
    for entry in fs::read_dir(path).what(what)? {
        let name = entry.what(what)?.file_name();
        let size = name
            .to_str()
            .and_then(|name| name.strip_prefix("hugetlb."))
            .and_then(|name| name.strip_suffix(".current"))
            // `hugetlb.2MB.rsvd.current` counts reservations.
            .filter(|size| !size.contains('.'));
        sizes.extend(size.map(str::to_owned));
    }
    sizes.sort();
    Ok(sizes)
}

/// A device that was idle has a line without counters in some kernels; it has nothing to tell.
fn io_stats(text: &str) -> Vec<IoStats> {
    nested_keyed(text)
        .filter_map(|(device, counters)| {
            let (major, minor) = device.split_once(':')?;
            let counters: HashMap<_, _> = counters
                .filter_map(|(name, value)| Some((name.to_owned(), number(value)?)))
                .collect();
            (!counters.is_empty()).then_some(IoStats {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
                counters,
                ..Default::default()
            })
        })
        .collect()
}

/// Source: the kernel's Documentation/accounting/psi.rst.
fn pressure(text: &str) -> Pressure {
    let mut pressure = Pressure::default();
    for (kind, figures) in nested_keyed(text) {
        let mut line = PressureLine::default();
        for (name, value) in figures {
            match name {
                "avg10" => line.avg10 = value.parse().unwrap_or_default(),
                "avg60" => line.avg60 = value.parse().unwrap_or_default(),
                "avg300" => line.avg300 = value.parse().unwrap_or_default(),
                "total" => line.total = value.parse().unwrap_or_default(),
                _ => {}
            }
        }
        match kind {
            "some" => pressure.some = Some(line).into(),
            "full" => pressure.full = Some(line).into(),
            _ => {}
        }
    }
    pressure
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with the files of a cgroup.
    fn cgroup(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    #[test]
    fn every_figure_has_its_place() {
        let dir = cgroup(&[
            (
                "cpu.stat",
                "usage_usec 30\nuser_usec 20\nsystem_usec 10\nnr_periods 4\n",
            ),
            ("memory.stat", "anon 4096\nfile 8192\n"),
            ("memory.current", "12288\n"),
            ("memory.max", "max\n"),
            ("memory.peak", "16384\n"),
            ("memory.swap.current", "1\n"),
            ("memory.swap.max", "2\n"),
            ("memory.events", "low 0\nhigh 0\nmax 3\noom 2\noom_kill 1\n"),
            ("pids.current", "5\n"),
            ("pids.max", "100\n"),
            (
                "io.stat",
                "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n7:1 \n253:16\n259:7 rios=9\n",
            ),
            ("hugetlb.2MB.current", "2097152\n"),
            ("hugetlb.2MB.max", "max\n"),
            ("hugetlb.2MB.events", "max 7\n"),
            ("hugetlb.2MB.rsvd.current", "0\n"),
            ("hugetlb.1GB.current", "0\n"),
            (
                "cpu.pressure",
                "some avg10=1.50 avg60=0.25 avg300=0.00 total=77\nfull avg10=0.00 avg60=0.00 avg300=0.01 total=7\n",
            ),
        ]);
        let stats = of(dir.path()).unwrap();
        assert_eq!((stats.cpu["usage_usec"], stats.cpu["nr_periods"]), (30, 4));
        assert_eq!((stats.memory["anon"], stats.memory["file"]), (4096, 8192));
        assert_eq!(
            (stats.memory_current, stats.memory_max, stats.memory_peak),
            (12_288, u64::MAX, 16_384)
        );
        assert_eq!((stats.swap_current, stats.swap_max), (1, 2));
        assert_eq!(stats.memory_events["oom_kill"], 1);
        assert_eq!((stats.pids_current, stats.pids_max), (5, 100));
        let io: Vec<_> = stats.io.iter().map(|io| (io.major, io.minor)).collect();
        assert_eq!(io, [(8, 0), (259, 7)]);
        assert_eq!(stats.io[0].counters["dios"], 6);
        let hugetlb: Vec<_> = stats
            .hugetlb
            .iter()
            .map(|huge| (huge.page_size.as_str(), huge.current, huge.max, huge.failed))
            .collect();
        assert_eq!(hugetlb, [("1GB", 0, 0, 0), ("2MB", 2_097_152, u64::MAX, 7)]);
        let some = &stats.cpu_pressure.some;
        assert_eq!((some.avg10, some.avg60, some.total), (1.5, 0.25, 77));
        assert_eq!(
            (
                stats.cpu_pressure.full.avg300,
                stats.cpu_pressure.full.total
            ),
            (0.01, 7)
        );
        assert!(stats.memory_pressure.is_none());
    }

    #[test]
    fn what_the_kernel_does_not_keep_is_absent() {
        let dir = cgroup(&[]);
        assert_eq!(of(dir.path()).unwrap(), ContainerStatsResponse::default());
    }
}
