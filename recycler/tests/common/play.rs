//! Playing a history: in tokio tasks on paused time, where the seed decides the order of everything.

use std::sync::Arc;
use std::time::Duration;

use qcow_recycler::recycler::{Control, run};
use qcow_recycler::{BlockDevice, Image};

use super::guests::{Errors, Failure, Shared};
use super::history::{After, History};

/// Runs a history on a device in tokio tasks; afterwards the image is closed. `closed` looks at the file after each
/// close.
///
/// # Errors
/// The first thing that is wrong, broken device rules and a failed `closed` included.
pub async fn play<D: BlockDevice + Clone>(
    history: &History,
    device: &D,
    shared: &Arc<Shared>,
    closed: impl Fn(&D) -> Result<(), String>,
) -> Result<(), Failure> {
    let open = || async {
        let image = Image::open(device.clone(), history.config.options()).await;
        image.map(Arc::new).map_err(|e| shared.failure(format!("opening: {e}")))
    };
    let closed = &closed;
    let close = |image: Arc<Image<D>>| async move {
        shared.note("close");
        let began = shared.model.lock().flush_begins();
        image.close().await.map_err(|e| shared.failure(format!("closing: {e}")))?;
        shared.flushed(began);
        shared.count(&image.stats());
        closed(device).map_err(|e| shared.failure(format!("after closing: {e}")))
    };
    let mut image = open().await?;
    for (number, round) in history.rounds.iter().enumerate() {
        shared.note(format!("round {number}{}", if round.recycler { " with the recycler" } else { "" }));
        let control = Control::new();
        let worker = round.recycler.then(|| tokio::spawn(run(image.clone(), control.clone())));
        let guests: Vec<_> = round
            .guests
            .iter()
            .cloned()
            .enumerate()
            .map(|(g, ops)| {
                let (shared, image) = (shared.clone(), image.clone());
                tokio::spawn(async move { shared.guest(&format!("guest {g}"), &image, &ops).await })
            })
            .collect();
        for guest in guests {
            guest.await.map_err(|e| shared.failure(format!("a guest panicked: {e}")))??;
        }
        if round.recycler && number % 2 == 0 {
            // Time for the recycler to settle and compact what the guests left.
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        control.stop();
        if let Some(worker) = worker {
            worker.await.map_err(|e| shared.failure(format!("the recycler panicked: {e}")))?;
        }
        let errors = image.stats().background_errors;
        if errors > 0 && shared.policy == Errors::None {
            return Err(shared.failure(format!("{errors} background errors")));
        }
        if history.compare {
            shared.compare(&image).await?;
        }
        match round.after {
            After::Nothing => {}
            After::Resize(sectors) => shared.resize(&image, sectors).await?,
            After::Reopen => {
                close(image).await?;
                image = open().await?;
                if history.compare {
                    shared.compare(&image).await?;
                }
            }
        }
    }
    shared.compare(&image).await?;
    close(image).await
}

/// Runs `future` on a runtime of its own whose time stands still unless everything waits for it; a history that makes
/// no progress for an hour of that time hangs.
///
/// # Errors
/// The future's own, or that it hangs.
pub fn in_paused_time(shared: &Shared, future: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let run = || {
        runtime.block_on(async {
            match tokio::time::timeout(Duration::from_secs(3600), future).await {
                Ok(result) => result,
                Err(_) => Err(shared.failure("it hangs")),
            }
        })
    };
    // Nothing of the history is used after a panic but what locks guard.
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default();
        Err(shared.failure(format!("panicked: {text}")))
    })
}
