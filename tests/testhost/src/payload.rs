//! Takes the uncompressed kernel out of a bzImage: the emulated CPU would need seconds for what xz does here
//! in a tenth of one (kernel: Documentation/arch/x86/boot.rst, `payload_offset` and `payload_length`).

use std::io::Write;
use std::ops::Range;
use std::process::{Command, Stdio};

/// What can be wrong with a kernel image.
#[derive(Debug, thiserror::Error)]
pub enum PayloadError {
    /// No boot protocol 2.08 or later.
    #[error("not a bzImage with a payload header")]
    Header,
    /// The payload is not inside of the file.
    #[error("bzImage: the payload lies outside of the file")]
    Bounds,
    /// Compressed by something other than xz.
    #[error("bzImage: the payload is not compressed with xz")]
    Compression,
    /// xz could not be run, or failed.
    #[error("xz: {0}")]
    Xz(String),
}

/// Where the compressed kernel is.
fn locate(image: &[u8]) -> Result<Range<usize>, PayloadError> {
    let u32_at = |at: usize| {
        image
            .get(at..at + 4)
            .and_then(|b| b.try_into().ok())
            .map(|b| u32::from_le_bytes(b) as usize)
            .ok_or(PayloadError::Header)
    };
    let version = u32_at(0x206)? & 0xffff;
    if image.get(0x202..0x206) != Some(b"HdrS") || version < 0x208 {
        return Err(PayloadError::Header);
    }
    let setup_sectors = match image[0x1f1] {
        0 => 4,
        n => usize::from(n),
    };
    let start = (setup_sectors + 1) * 512 + u32_at(0x248)?;
    let end = start
        .checked_add(u32_at(0x24c)?)
        .filter(|end| *end <= image.len())
        .ok_or(PayloadError::Bounds)?;
    Ok(start..end)
}

/// The kernel's ELF file.
pub fn vmlinux(image: &[u8]) -> Result<Vec<u8>, PayloadError> {
    let payload = &image[locate(image)?];
    if !payload.starts_with(b"\xfd7zXZ\0") {
        return Err(PayloadError::Compression);
    }
    // The size that follows the stream is no xz data, hence --single-stream.
    let mut xz = Command::new("xz")
        .args(["-dc", "--single-stream"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| PayloadError::Xz(format!("{e}; install xz-utils")))?;
    let mut stdin = xz.stdin.take();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || {
            // xz stops reading at the stream's end; what it says at its own end is what counts.
            if let Some(stdin) = &mut stdin {
                let _ = stdin.write_all(payload);
            }
        });
        xz.wait_with_output()
    })
    .map_err(|e| PayloadError::Xz(e.to_string()))?;
    if !output.status.success() || !output.stdout.starts_with(b"\x7fELF") {
        return Err(PayloadError::Xz(format!("{}, no ELF file", output.status)));
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(setup: u8, offset: u32, length: u32) -> Vec<u8> {
        let mut image = vec![0; 4096];
        image[0x1f1] = setup;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&[0x0f, 0x02]);
        image[0x248..0x24c].copy_from_slice(&offset.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&length.to_le_bytes());
        image
    }

    #[test]
    fn the_payload_starts_after_the_setup_sectors() {
        assert_eq!(locate(&header(1, 16, 100)).unwrap(), 1040..1140);
        assert_eq!(locate(&header(0, 0, 10)).unwrap(), 2560..2570);
    }

    #[test]
    fn a_payload_out_of_bounds_or_a_missing_header_is_refused() {
        assert!(matches!(
            locate(&header(1, 16, 1 << 20)),
            Err(PayloadError::Bounds)
        ));
        assert!(matches!(
            locate(&header(1, u32::MAX, u32::MAX)),
            Err(PayloadError::Bounds)
        ));
        assert!(matches!(locate(b"MZ"), Err(PayloadError::Header)));
        assert!(matches!(
            vmlinux(&header(1, 16, 100)),
            Err(PayloadError::Compression)
        ));
    }
}
