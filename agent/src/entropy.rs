//! The guest's random numbers.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use bulkhead_protocol::SEED_LENGTH;

/// `struct rand_pool_info` of linux/random.h, with its buffer.
#[repr(C)]
struct Pool {
    /// In bits.
    entropy_count: libc::c_int,
    buf_size: libc::c_int,
    buf: [u8; SEED_LENGTH],
}

mod request {
    nix::ioctl_write_ptr!(add_entropy, b'R', 0x03, [libc::c_int; 2]);
    nix::ioctl_none!(reseed, b'R', 0x07);
}

/// Seeds the kernel's generator: what it gives from now on depends on `seed` (random(4), RNDADDENTROPY and RNDRESEEDCRNG).
pub fn seed(seed: [u8; SEED_LENGTH]) -> io::Result<()> {
    let device = File::options().write(true).open("/dev/random")?;
    let length = SEED_LENGTH as libc::c_int;
    let pool = Pool {
        entropy_count: length * 8,
        buf_size: length,
        buf: seed,
    };
    // SAFETY: the kernel reads the two numbers and as many bytes behind them as the second says, which are there.
    unsafe { request::add_entropy(device.as_raw_fd(), (&raw const pool).cast()) }?;
    // SAFETY: takes no argument.
    unsafe { request::reseed(device.as_raw_fd()) }?;
    Ok(())
}
