//! Checks of an image that is open and in use: what is on its way from one state to another is no finding.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use crate::common::memory::MemoryDevice;
use qcow_recycler::blocking::block_on;
use qcow_recycler::buf::{IoBuf, IoBufMut};
use qcow_recycler::device::{BlockDevice, Features};
use qcow_recycler::image::{CreateOptions, create};
use qcow_recycler::{Image, Options};

const CLUSTER: u64 = 4096;

/// A device whose one slow read ends during a flush, which waits until the guest has its data.
#[derive(Clone)]
struct SlowRead {
    memory: MemoryDevice,
    state: Arc<Slow>,
}

#[derive(Default)]
struct Slow {
    /// The next read waits.
    armed: AtomicBool,
    /// During which flush from now on it goes on.
    flushes: AtomicU32,
    at: Mutex<At>,
    changed: Condvar,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum At {
    #[default]
    Nothing,
    Waiting,
    GoesOn,
    Ended,
}

impl Slow {
    fn set(&self, at: At) {
        *self.at.lock().unwrap() = at;
        self.changed.notify_all();
    }

    fn wait_for(&self, at: At) {
        drop(self.changed.wait_while(self.at.lock().unwrap(), |now| *now != at).unwrap());
    }
}

impl BlockDevice for SlowRead {
    fn features(&self) -> Features {
        self.memory.features()
    }

    async fn length(&self) -> io::Result<u64> {
        self.memory.length().await
    }

    async fn read(&self, offset: u64, buf: IoBufMut<'_>) -> io::Result<()> {
        if self.state.armed.swap(false, Ordering::SeqCst) {
            self.state.set(At::Waiting);
            self.state.wait_for(At::GoesOn);
        }
        self.memory.read(offset, buf).await
    }

    async fn write(&self, offset: u64, buf: IoBuf<'_>) -> io::Result<()> {
        self.memory.write(offset, buf).await
    }

    async fn flush(&self) -> io::Result<()> {
        if self.state.flushes.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.state.set(At::GoesOn);
            self.state.wait_for(At::Ended);
        }
        Ok(())
    }

    async fn truncate(&self, length: u64) -> io::Result<()> {
        self.memory.truncate(length).await
    }
}

/// A cluster is discarded while a read of it is under way, which ends during the `flush`-th flush of a check.
fn discarded_under_a_reader(flush: u32) {
    let device = SlowRead { memory: MemoryDevice::new(Vec::new()), state: Arc::default() };
    let state = &device.state;
    let options = CreateOptions { cluster_size: CLUSTER, ..CreateOptions::new(1 << 20) };
    block_on(create(&device, &options)).unwrap();
    let image = block_on(Image::open(device.clone(), Options::default())).unwrap();
    block_on(image.write(0, IoBuf::new(&[7; 2 * CLUSTER as usize]))).unwrap();
    block_on(image.flush()).unwrap();
    std::thread::scope(|scope| {
        state.armed.store(true, Ordering::SeqCst);
        scope.spawn(|| {
            let mut data = [0; CLUSTER as usize];
            block_on(image.read(0, IoBufMut::new(&mut data))).unwrap();
            assert_eq!(data, [7; CLUSTER as usize], "read while it was discarded");
            state.set(At::Ended);
        });
        state.wait_for(At::Waiting);
        block_on(image.discard(0, CLUSTER)).unwrap();
        state.flushes.store(flush, Ordering::SeqCst);
        let report = block_on(image.check()).unwrap();
        state.flushes.store(0, Ordering::SeqCst);
        // If the check flushed less often, the read is still under way.
        if *state.at.lock().unwrap() == At::Waiting {
            state.set(At::GoesOn);
        }
        assert!(report.is_clean(), "the read ended during flush {flush}: {report:?}");
    });
    block_on(image.close()).unwrap();
}

#[test]
fn a_request_that_ends_meanwhile_makes_no_leak() {
    (1..=4).for_each(discarded_under_a_reader);
}
