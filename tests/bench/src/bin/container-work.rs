//! What the benchmark's containers do: a static program, so that neither a shell's forks nor a dynamic linker's work is measured.
//!
//!     container-work prepare FOLDER    files that a container is to find there
//!     container-work files FOLDER      works on them; a line for each step: name, amount, unit, nanoseconds
//!     container-work requests FOLDER   asks the host, if it is in a guest, for as little as can be, again and again; such lines too
//!     container-work sink BYTES        reads standard input; says "ready" before and "done" after it

use std::arch::x86_64::__cpuid;
use std::env;
use std::fs::{self, File};
use std::hint::black_box;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use nix::sys::statvfs::fstatvfs;

/// How much is done.
struct Sizes {
    /// Length of the large files, in MiB.
    mib: usize,
    /// Reads at random places; at most as many as the large file has blocks.
    reads: usize,
    /// Small files.
    files: usize,
    /// Sources of the build.
    sources: usize,
}

const SIZES: Sizes = Sizes {
    mib: 64,
    reads: 4096,
    files: 5000,
    sources: 100,
};

const MIB: usize = 1 << 20;
/// What programs like `cp` and `cat` read and write at once.
const CHUNK: usize = 128 << 10;
const BLOCK: usize = 4 << 10;
const SMALL: &[u8] = &[b's'; 100];
const HEADERS: usize = 40;
const HEADERS_OF_A_SOURCE: usize = 10;
const SOURCE_LEN: usize = 8 << 10;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["prepare", folder] => Work::new(folder, SIZES).prepare(),
        ["files", folder] => Work::new(folder, SIZES).run(&mut io::stdout()),
        ["requests", folder] => requests(folder, &mut io::stdout()),
        ["sink", bytes] => sink(bytes.parse().context("BYTES is no number")?),
        _ => bail!("expected: prepare FOLDER, files FOLDER, requests FOLDER, or sink BYTES"),
    }
}

fn sink(bytes: u64) -> anyhow::Result<()> {
    // Reads of more than its own buffer go past it.
    let mut stdin = io::stdin().lock();
    let mut buffer = vec![0; CHUNK];
    println!("ready");
    let mut left = bytes;
    while left > 0 {
        match stdin.read(&mut buffer)? {
            0 => bail!("standard input ended {left} bytes early"),
            count => left = left.checked_sub(count as u64).context("too much input")?,
        }
    }
    println!("done");
    Ok(())
}

/// The two cheapest ways to the host and back. CPUID is answered by the hypervisor's kernel, for programs without rights too. How
/// much room a file system has is remembered by nobody between a program and the host's kernel, and takes no data.
fn requests(folder: &str, output: &mut impl Write) -> anyhow::Result<()> {
    const TIMES: usize = 2000;
    step(output, "exit", TIMES, "exits", &|| {
        for _ in 0..TIMES {
            black_box(__cpuid(0));
        }
        Ok(())
    })?;
    let folder = File::open(folder).with_context(|| format!("cannot open {folder}"))?;
    step(output, "room", TIMES, "requests", &|| {
        for _ in 0..TIMES {
            fstatvfs(&folder)?;
        }
        Ok(())
    })
}

/// Does something and reports how long it took.
fn step(
    output: &mut impl Write,
    name: &str,
    amount: usize,
    unit: &str,
    work: &dyn Fn() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let began = Instant::now();
    work().with_context(|| format!("step {name:?} failed"))?;
    let took = began.elapsed().as_nanos();
    Ok(writeln!(output, "{name}\t{amount}\t{unit}\t{took}")?)
}

struct Work {
    folder: PathBuf,
    sizes: Sizes,
}

impl Work {
    fn new(folder: impl Into<PathBuf>, sizes: Sizes) -> Self {
        let folder = folder.into();
        Self { folder, sizes }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Makes what the container reads: it is not to find in its caches what it wrote itself.
    fn prepare(&self) -> anyhow::Result<()> {
        for folder in ["sources", "include-first", "include"] {
            fs::create_dir_all(self.path(folder))?;
        }
        for name in ["sequential", "random"] {
            write(&self.path(name), self.sizes.mib)?;
        }
        for number in 0..self.sizes.sources {
            let source = vec![number as u8; SOURCE_LEN];
            fs::write(self.path(&format!("sources/{number}.c")), source)?;
        }
        for number in 0..HEADERS {
            let header = vec![number as u8; BLOCK];
            fs::write(self.path(&format!("include/{number}.h")), header)?;
        }
        Ok(())
    }

    /// Does every step and leaves the folder as it was.
    fn run(&self, output: &mut impl Write) -> anyhow::Result<()> {
        let Sizes {
            mib, reads, files, ..
        } = self.sizes;
        let mut step =
            |name: &str, amount: usize, unit: &str, work: &dyn Fn() -> anyhow::Result<()>| {
                step(output, name, amount, unit, work)
            };
        step("write", mib, "MiB", &|| write(&self.path("written"), mib))?;
        fs::remove_file(self.path("written"))?;
        step("read", mib, "MiB", &|| self.read())?;
        step("read again", mib, "MiB", &|| self.read())?;
        step("random reads", reads, "reads", &|| self.read_at_random())?;

        let many = self.path("many");
        fs::create_dir(&many)?;
        let small: Vec<_> = (0..files)
            .map(|number| many.join(number.to_string()))
            .collect();
        step("make", files, "files", &|| {
            for path in &small {
                File::create_new(path)?.write_all(SMALL)?;
            }
            Ok(())
        })?;
        step("stat", files, "files", &|| {
            for path in &small {
                ensure!(fs::metadata(path)?.len() == SMALL.len() as u64);
            }
            Ok(())
        })?;
        step("remove", files, "files", &|| {
            for path in &small {
                fs::remove_file(path)?;
            }
            Ok(())
        })?;
        fs::remove_dir(&many)?;

        step("build", self.sizes.sources, "sources", &|| self.build())?;
        fs::remove_dir_all(self.path("objects"))?;
        Ok(())
    }

    fn read(&self) -> anyhow::Result<()> {
        let mut file = File::open(self.path("sequential"))?;
        let mut buffer = vec![0; CHUNK];
        let mut len = 0;
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                count => len += count,
            }
        }
        ensure!(len == self.sizes.mib * MIB, "the file has {len} bytes");
        Ok(())
    }

    /// Every read is of another block, and no place tells the next one's.
    fn read_at_random(&self) -> anyhow::Result<()> {
        let file = File::open(self.path("random"))?;
        let mut buffer = vec![0; BLOCK];
        for block in scattered(self.sizes.mib * MIB / BLOCK).take(self.sizes.reads) {
            file.read_exact_at(&mut buffer, (block * BLOCK) as u64)?;
        }
        Ok(())
    }

    /// What a compiler does to files: looks for headers along a search path, reads, computes, and writes objects under temporary names;
    /// then a linker reads them all.
    fn build(&self) -> anyhow::Result<()> {
        fs::create_dir(self.path("objects"))?;
        for number in 0..self.sizes.sources {
            let source = fs::read(self.path(&format!("sources/{number}.c")))?;
            let mut hash = digest(FNV_OFFSET, &source);
            for header in (0..HEADERS_OF_A_SOURCE).map(|index| (number + index * 7) % HEADERS) {
                let first = self.path(&format!("include-first/{header}.h"));
                ensure!(!first.exists(), "{} was not to exist", first.display());
                hash = digest(hash, &fs::read(self.path(&format!("include/{header}.h")))?);
            }
            let temporary = self.path(&format!("objects/{number}.tmp"));
            fs::write(&temporary, hash.to_le_bytes().repeat(SOURCE_LEN / 8))?;
            fs::rename(temporary, self.path(&format!("objects/{number}.o")))?;
        }
        let mut program = Vec::new();
        for number in 0..self.sizes.sources {
            program.extend(fs::read(self.path(&format!("objects/{number}.o")))?);
        }
        black_box(digest(FNV_OFFSET, &program));
        fs::write(self.path("objects/program"), program)?;
        Ok(())
    }
}

/// Writes a file and waits for the disk: what a cache took in is not written yet.
fn write(path: &Path, mib: usize) -> anyhow::Result<()> {
    let chunk = vec![b'w'; CHUNK];
    let mut file = File::create_new(path)?;
    for _ in 0..mib * MIB / CHUNK {
        file.write_all(&chunk)?;
    }
    file.sync_all()?;
    Ok(())
}

/// All numbers below a power of two, once each, out of order: a linear congruential generator with full period (Hull and Dobell,
/// "Random Number Generators", 1962: odd increment, multiplier 1 more than a multiple of 4).
fn scattered(count: usize) -> impl Iterator<Item = usize> {
    debug_assert!(count.is_power_of_two());
    let next =
        move |&last: &usize| Some((last.wrapping_mul(1_103_515_245).wrapping_add(12_345)) % count);
    std::iter::successors(Some(0), next).take(count)
}

const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x100_0000_01b3;

/// FNV-1a: the computing between the reads.
fn digest(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(FNV_PRIME)
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeSet;

    use super::{Sizes, Work, fs, scattered};

    const FEW: Sizes = Sizes {
        mib: 1,
        reads: 16,
        files: 3,
        sources: 2,
    };

    #[test]
    fn the_work_reports_every_step_and_leaves_its_folder_as_it_found_it() {
        let folder = std::env::temp_dir().join(format!("container-work-{}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        let work = Work::new(&folder, FEW);
        let names = || -> BTreeSet<_> {
            let entries = fs::read_dir(&folder).unwrap();
            entries.map(|entry| entry.unwrap().file_name()).collect()
        };
        work.prepare().unwrap();
        let before = names();
        let mut output = Vec::new();
        work.run(&mut output).unwrap();
        let after = names();
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(before, after);
        let output = String::from_utf8(output).unwrap();
        let steps: Vec<_> = output
            .lines()
            .map(|line| line.rsplit_once('\t').unwrap().0)
            .collect();
        let expected = [
            "write\t1\tMiB",
            "read\t1\tMiB",
            "read again\t1\tMiB",
            "random reads\t16\treads",
            "make\t3\tfiles",
            "stat\t3\tfiles",
            "remove\t3\tfiles",
            "build\t2\tsources",
        ];
        assert_eq!(steps, expected);
    }

    #[test]
    fn every_block_is_read_once_and_hardly_one_after_its_neighbour() {
        let blocks: Vec<_> = scattered(16384).collect();
        assert_eq!(blocks.iter().collect::<BTreeSet<_>>().len(), 16384);
        let neighbours = blocks.windows(2).filter(|pair| pair[0] + 1 == pair[1]);
        assert!(neighbours.count() < 16);
    }
}
