//! io_uring without a library around it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use bench_work::buffer::Buffer;
use bench_work::protocol::{Kind, Work};
use io_uring::{IoUring, opcode, types};

/// A ring with the file registered.
pub struct Ring(IoUring);

impl Ring {
    pub fn new(file: &File, depth: usize) -> io::Result<Self> {
        let ring =
            IoUring::builder().setup_single_issuer().setup_coop_taskrun().build(depth.next_power_of_two() as u32)?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        Ok(Self(ring))
    }

    /// One request under way with each buffer; the next is submitted when one has been reaped. Nothing is under way
    /// when this returns.
    pub fn go_through(&mut self, work: &Work, offsets: &[u64], buffers: &mut [Buffer]) -> io::Result<()> {
        let mut offsets = offsets.iter();
        let mut free: Vec<u64> = (0..buffers.len() as u64).collect();
        let mut missing = 0;
        let mut result = Ok(());
        loop {
            {
                let mut submissions = self.0.submission();
                while result.is_ok()
                    && let Some(slot) = free.pop()
                {
                    let Some(&offset) = offsets.next() else { break };
                    let (start, length) = (buffers[slot as usize].as_mut_ptr(), work.size as u32);
                    let entry = match work.kind {
                        Kind::Read => opcode::Read::new(types::Fixed(0), start, length).offset(offset).build(),
                        Kind::Write => opcode::Write::new(types::Fixed(0), start, length).offset(offset).build(),
                        Kind::Discard => return Err(io::Error::other("discards are measured one by one")),
                    };
                    // SAFETY: the buffer lives until the request has been reaped, below, and nobody else uses it.
                    unsafe { submissions.push(&entry.user_data(slot)) }.map_err(io::Error::other)?;
                    missing += 1;
                }
            }
            if missing == 0 {
                return result;
            }
            self.0.submit_and_wait(1)?;
            for completion in self.0.completion() {
                missing -= 1;
                free.push(completion.user_data());
                if completion.result() != work.size as i32 {
                    result = Err(io::Error::from_raw_os_error(-completion.result()));
                }
            }
        }
    }
}
