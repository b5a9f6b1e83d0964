//! How the end of a transfer is told to the one who began it, from C if need be.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::sync::oneshot;

use crate::sync::Mutex;

/// Who is told of the ends of transfers.
pub trait Ended: Send + Sync + 'static {
    /// The transfer with this number has ended. Called from any thread; does not wait for anything.
    fn ended(&self, number: u32, result: io::Result<()>);
}

struct End {
    told: Arc<dyn Ended>,
    number: u32,
}

/// Who is told of the ends of the transfers that have, one after the other, a certain number.
pub(crate) struct Addressee(Arc<End>);

impl Addressee {
    pub(crate) fn new(told: Arc<dyn Ended>, number: u32) -> Self {
        Addressee(Arc::new(End { told, number }))
    }

    /// For the next transfer. Allocates nothing.
    pub(crate) fn done(&self) -> Done {
        Done(Some(self.0.clone()))
    }
}

/// To be told once of the end of one transfer. If it is dropped instead, by a device that panics, the transfer has failed.
pub struct Done(Option<Arc<End>>);

impl Done {
    /// Tells `told` of the end of the transfer `number`.
    pub fn new(told: Arc<dyn Ended>, number: u32) -> Self {
        Addressee::new(told, number).done()
    }

    /// The transfer has ended. It may have, on another thread, before the call that began it returns.
    pub fn complete(mut self, result: io::Result<()>) {
        self.tell(result);
    }

    fn tell(&mut self, result: io::Result<()>) {
        if let Some(end) = self.0.take() {
            end.told.ended(end.number, result);
        }
    }

    /// A pointer that stands for this, to be taken back once by [`from_raw`](Self::from_raw).
    #[must_use]
    pub fn into_raw(mut self) -> *const c_void {
        // It is there until it is used up, which takes the value itself.
        self.0.take().map_or(std::ptr::null(), |end| Arc::into_raw(end).cast())
    }

    /// Takes back what [`into_raw`](Self::into_raw) gave.
    ///
    /// # Safety
    /// `raw` came from `into_raw` and has not been taken back.
    #[must_use]
    pub unsafe fn from_raw(raw: *const c_void) -> Self {
        // SAFETY: as promised by the caller.
        Done(Some(unsafe { Arc::from_raw(raw.cast()) }))
    }
}

impl Drop for Done {
    fn drop(&mut self) {
        self.tell(Err(io::Error::other("the device gave the transfer up")));
    }
}

/// The end of a transfer as a future: see [`ending`].
#[must_use = "dropping it waits for the end"]
pub struct Ending(Option<oneshot::Receiver<io::Result<()>>>);

/// Has `begin` begin a transfer, and gives its end as a future. The transfer's memory is in use until it has ended, so
/// dropping the future before waits for that.
pub fn ending(begin: impl FnOnce(Done)) -> Ending {
    struct Teller(Mutex<Option<oneshot::Sender<io::Result<()>>>>);
    impl Ended for Teller {
        fn ended(&self, _: u32, result: io::Result<()>) {
            if let Some(sender) = self.0.lock().take() {
                let _ = sender.send(result);
            }
        }
    }
    let (sender, receiver) = oneshot::channel();
    let ending = Ending(Some(receiver));
    begin(Done::new(Arc::new(Teller(Mutex::new(Some(sender)))), 0));
    ending
}

impl Future for Ending {
    type Output = io::Result<()>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        // Nothing comes after the end.
        let Some(receiver) = &mut self.0 else { return Poll::Pending };
        let Poll::Ready(end) = Pin::new(receiver).poll(context) else { return Poll::Pending };
        self.0 = None;
        // Whoever drops the sender has told of the end before.
        Poll::Ready(end.unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into())))
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        if let Some(receiver) = self.0.take() {
            let _ = pollster::block_on(receiver);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_transfer_ends_when_it_is_told_or_given_up() {
        pollster::block_on(ending(|done| done.complete(Ok(())))).unwrap();
        let later = ending(|done| {
            let raw = done.into_raw() as usize;
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(5));
                // SAFETY: it came from `into_raw` just now.
                unsafe { Done::from_raw(raw as *const c_void) }.complete(Err(io::ErrorKind::StorageFull.into()));
            });
        });
        assert_eq!(pollster::block_on(later).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert!(pollster::block_on(ending(drop)).is_err());
    }

    #[test]
    fn an_end_that_is_not_awaited_is_waited_for() {
        let mut byte = Box::new(1u8);
        let at = std::ptr::from_mut(&mut *byte) as usize;
        drop(ending(|done| {
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(5));
                // SAFETY: the byte is kept, and not looked at, until the end was told.
                unsafe { *(at as *mut u8) = 2 };
                done.complete(Ok(()));
            });
        }));
        assert_eq!(*byte, 2);
    }
}
