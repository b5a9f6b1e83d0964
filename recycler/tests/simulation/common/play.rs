//! Playing a history: in tokio tasks on paused time, where the seed decides the order of everything.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use qcow_recycler::recycler::{Control, run};
use qcow_recycler::{BlockDevice, Image, LogLevel, Logger, Options};
use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::config::{Config, Scale};
use super::guests::{Clock, Errors, Failure, Shared, Work};
use super::history::{After, History, Length, Op};
use super::sim::SimDevice;
use super::verify::{self, Tolerance};

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
        // What the library says goes into the trace: "2 background errors" alone tells nobody anything.
        let trace = shared.clone();
        let logger = Logger::new(move |level, message| {
            if level <= LogLevel::Warning {
                trace.note(format!("{level:?}: {message}"));
            }
        });
        let options = Options { logger, ..history.config.options() };
        let image = history.config.open_as(device.clone(), options, history.config.delay).await;
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
        // Every other time the recycler may settle and compact what the guests left.
        let rest = Duration::from_millis(if number % 2 == 0 { 300 } else { 0 });
        work(&image, shared, &round.guests, round.recycler.then_some(rest)).await?;
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
            After::GoBack(number) => shared.go_back(&image, number).await?,
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

/// Guests at work, each in a task; alongside the recycler, if it gets some rest afterwards.
///
/// # Errors
/// What a guest finds, a panic, or a recycler that never comes to rest.
pub async fn work<D: BlockDevice>(
    image: &Arc<Image<D>>,
    shared: &Arc<Shared>,
    guests: &[Vec<Op>],
    recycler: Option<Duration>,
) -> Result<(), Failure> {
    let control = Control::new();
    let worker = recycler.map(|_| tokio::spawn(run(image.clone(), control.clone())));
    let watchdog = Watchdog::new(control.clone(), shared.clone());
    let guests: Vec<_> = guests
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
    if let Some(rest) = recycler.filter(|rest| !rest.is_zero()) {
        tokio::time::sleep(rest).await;
    }
    control.stop();
    if let Some(worker) = worker {
        worker.await.map_err(|e| shared.failure(format!("the recycler panicked: {e}")))?;
    }
    if watchdog.barked() {
        return Err(shared.failure("the recycler never comes to rest"));
    }
    Ok(())
}

/// Stops a recycler that keeps its thread busy for so long that something must be wrong (paused time does not help there:
/// it stands still as long as there is something to do). If that does not help, ends the process with a report.
struct Watchdog {
    barked: Arc<AtomicBool>,
    _done: mpsc::Sender<()>,
}

impl Watchdog {
    const PATIENCE: Duration = Duration::from_secs(20);

    fn new(control: Control, shared: Arc<Shared>) -> Watchdog {
        let (done, is_done) = mpsc::channel();
        let barked = Arc::new(AtomicBool::new(false));
        let bark = barked.clone();
        std::thread::spawn(move || {
            let too_late = || is_done.recv_timeout(Self::PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout);
            if too_late() {
                bark.store(true, Ordering::SeqCst);
                control.stop();
                if too_late() {
                    let config = shared.config;
                    eprintln!("seed {}, {config}\n{}", config.seed, shared.failure("it never comes to rest"));
                    std::process::abort();
                }
            }
        });
        Watchdog { barked, _done: done }
    }

    fn barked(&self) -> bool {
        self.barked.load(Ordering::SeqCst)
    }
}

/// Runs `future` on a runtime of its own whose time stands still unless everything waits for it; a history that makes
/// no progress for an hour of that time hangs.
///
/// # Errors
/// The future's own, or that it hangs.
pub fn in_paused_time(shared: &Shared, future: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let run = || verify::in_paused_time(future).unwrap_or_else(|hangs| Err(shared.failure(hangs)));
    // Nothing of the history is used after a panic but what locks guard.
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default();
        Err(shared.failure(format!("panicked: {text}")))
    })
}

/// A random history on a disk with several L2 tables.
pub fn random_history(seed: u64) -> History {
    let mut rng = SmallRng::seed_from_u64(seed);
    let config = Config::random(seed, Scale::Small, &mut rng);
    History::random(config, Length { rounds: 5, guests: 4, ops: 30 }, &mut rng)
}

/// Checks the file of a closed image; with `qemu`, QEMU checks and reads it too.
///
/// # Errors
/// What is wrong with it.
pub fn look_at_file(bytes: &[u8], shared: &Shared, qemu: bool) -> Result<(), String> {
    verify::our_check(bytes, Tolerance::Clean)?;
    if qemu {
        verify::qemu_check(bytes, Tolerance::Clean)?;
        let mut model = shared.model.lock().clone();
        let disk = verify::qemu_contents(bytes)?;
        model.read(0, &disk).map_err(|m| format!("read by QEMU: {m}; {}", model.explain(m.sector)))?;
    }
    Ok(())
}

/// Plays a history on paused time against the model. Returns what the recycler did.
///
/// # Errors
/// The first thing that is wrong.
pub fn against_model(history: &History, qemu: bool) -> Result<Work, Failure> {
    let config = history.config;
    let shared = Shared::new(config, Clock::Tokio, Errors::None);
    let device = SimDevice::new(config.create(), config.device(false));
    device.limit_operations(2_000_000);
    let result = in_paused_time(&shared, async {
        play(history, &device, &shared, |d| look_at_file(&d.contents(), &shared, qemu)).await
    });
    match device.violations() {
        broken if broken.is_empty() => result.map(|()| *shared.work.lock()),
        broken => {
            let also = result.err().map_or_else(String::new, |f| format!("; then {}", f.message));
            Err(shared.failure(format!("rules of the device trait broken: {}{also}", broken.join("; "))))
        }
    }
}
