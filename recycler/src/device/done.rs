//! How the end of a transfer is told to the one who began it, from C if need be.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::sync::Arc;

/// Who is told of the ends of transfers.
pub trait Ended: Send + Sync + 'static {
    /// The transfer with this number has ended. Called from any thread; does not wait for anything.
    fn ended(&self, number: u32, result: io::Result<()>);
}

struct End {
    told: Arc<dyn Ended>,
    number: u32,
}

/// To be told once of the end of one transfer.
#[derive(Clone)]
pub struct Done(Arc<End>);

impl Done {
    /// Tells `told` of the end of the transfer `number`.
    pub fn new(told: Arc<dyn Ended>, number: u32) -> Self {
        Done(Arc::new(End { told, number }))
    }

    /// The transfer has ended. It may have, on another thread, before the call that began it returns.
    pub fn complete(self, result: io::Result<()>) {
        self.0.told.ended(self.0.number, result);
    }

    /// A pointer that stands for this, to be taken back once by [`from_raw`](Self::from_raw).
    #[must_use]
    pub fn into_raw(self) -> *const c_void {
        Arc::into_raw(self.0).cast()
    }

    /// Takes back what [`into_raw`](Self::into_raw) gave.
    ///
    /// # Safety
    /// `raw` came from `into_raw` and has not been taken back.
    #[must_use]
    pub unsafe fn from_raw(raw: *const c_void) -> Self {
        // SAFETY: as promised by the caller.
        Done(unsafe { Arc::from_raw(raw.cast()) })
    }
}
