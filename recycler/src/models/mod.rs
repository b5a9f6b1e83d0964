//! Models: small scenes of the real code, played in thousands of interleavings.
//!
//! A scene starts a few threads that use the engine's own types, and asserts what must hold whatever the order. With the
//! feature `models` (`make models`) the locks and atomics of [`crate::sync`] are shuttle's, and [`play`] runs the scene
//! again and again, each time with another choice of who goes on at each lock, atomic operation, await and device call; a
//! thread that waits for ever is found as well. Schedules are drawn at random, with few preemptions (PCT), and uniformly over
//! the orders (URW), in turns. Without the feature a scene runs a few times on threads of the system: that is what miri
//! repeats with its own schedules, and with the stale values and races that the memory orderings allow, which shuttle does not
//! show (for it every operation is sequentially consistent).
//!
//! Why shuttle and not loom: loom tries every schedule, which it can do for two threads with a handful of operations, not
//! for an image under writers and a compaction; and its atomics are weaker than `SeqCst`, on which the epochs rely.
//!
//! **To add a model**: let the code take its locks and atomics from [`crate::sync`]; write a function that plays the
//! scene once, from nothing, with [`spawn`] and [`block_on`], and a test that hands it to [`play`]. It must not look at the clock
//! or at anything else that differs between runs. Then show that the scene can see: name a
//! [`Mutation`](crate::mutation::Mutation) that breaks the step it is about, and add the pair to
//! `every_weakening_is_found`.

mod device;
mod epochs;
mod image;
mod slices;
mod turns;
mod volume;

#[path = "../../tests/simulation/common/memory.rs"]
#[allow(unreachable_pub, dead_code)]
mod memory;
#[path = "../../tests/simulation/common/slice.rs"]
#[allow(unreachable_pub, dead_code)]
mod slice;

/// Runs a thread of a scene.
#[cfg(feature = "models")]
pub(crate) use shuttle::thread::spawn;
#[cfg(not(feature = "models"))]
pub(crate) use std::thread::spawn;

/// Waits for a future on this thread.
#[cfg(not(feature = "models"))]
pub(crate) use pollster::block_on;
#[cfg(feature = "models")]
pub(crate) use shuttle::future::block_on;

/// Plays a scene in many interleavings: the slice that `make test` has time for, or this scene's `share` of a soak.
#[cfg(not(feature = "models"))]
pub(crate) fn play(_name: &str, _share: f64, scene: fn()) {
    for _ in 0..if cfg!(miri) { 1 } else { 20 } {
        scene();
    }
}

#[cfg(feature = "models")]
pub(crate) use explored::play;

#[cfg(feature = "models")]
mod explored {
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
    use std::sync::RwLock;
    use std::time::Instant;

    use shuttle::scheduler::{PctScheduler, RandomScheduler, UrwRandomScheduler};
    use shuttle::{Config, FailurePersistence, MaxSteps, Runner};

    use super::slice::{Slice, tell};
    use crate::mutation::{Mutation, activate};

    /// Schedules that one seed stands for.
    const PER_SEED: usize = 100;
    /// Seconds that a scene gets in `make test`.
    const SECONDS: u64 = 5;

    /// Mutations are process-wide: whoever turns one on has the process to itself.
    static MUTATED: RwLock<()> = RwLock::new(());

    pub(crate) fn play(name: &str, share: f64, scene: fn()) {
        let _unmutated = MUTATED.read();
        let began = Instant::now();
        let mut schedules = 0;
        for seed in Slice::new(SECONDS, 3, share) {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(seed, scene))) {
                println!("model {name} failed: QCR_SEED={seed} repeats it");
                resume_unwind(panic);
            }
            schedules += PER_SEED as u64;
        }
        println!("model {name}: {} seconds", began.elapsed().as_secs());
        tell(&[("schedules", schedules)]);
    }

    fn run(seed: u64, scene: fn()) {
        let mut config = Config::new();
        config.failure_persistence = FailurePersistence::None;
        config.max_steps = MaxSteps::FailAfter(1_000_000);
        config.silence_warnings = true;
        config.stack_size = 256 << 10;
        match seed % 3 {
            0 => _ = Runner::new(RandomScheduler::new_from_seed(seed, PER_SEED), config).run(scene),
            1 => _ = Runner::new(PctScheduler::new_from_seed(seed, 2 + seed as usize % 4, PER_SEED), config).run(scene),
            _ => _ = Runner::new(UrwRandomScheduler::new_from_seed(seed, PER_SEED), config).run(scene),
        }
    }

    /// Breaks a step, and says after how many seeds the scene fails; `None` if it does not within `seeds`.
    fn found(mutation: Mutation, seeds: u64, scene: fn()) -> Option<u64> {
        activate(Some(mutation));
        let found = (1..=seeds).find(|&seed| catch_unwind(AssertUnwindSafe(|| run(seed, scene))).is_err());
        activate(None);
        found
    }

    /// That the scenes see what they are about.
    #[test]
    fn every_weakening_is_found() {
        let _alone = MUTATED.write();
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| {}));
        let weakenings: [(Mutation, fn()); 14] = [
            (Mutation::EnterUnchecked, super::epochs::reuse),
            (Mutation::ReuseWithoutGrace, super::epochs::reuse),
            (Mutation::LeaveUnnoticed, super::epochs::waiters),
            (Mutation::WaitForTurnUnregistered, super::turns::exclusion),
            (Mutation::TagAfterEntries, super::slices::looks),
            (Mutation::FillLocked, super::slices::locks),
            (Mutation::RunsWithoutLock, super::slices::runs),
            (Mutation::ExtendUnlooked, super::volume::extensions),
            (Mutation::BoundsAfterEntry, super::image::one_move),
            (Mutation::CommitCancelledMove, super::image::moves),
            (Mutation::CopyWithoutGrace, super::image::moves),
            (Mutation::CleanAfterCopy, super::image::commits),
            (Mutation::FreezeUnlocked, super::image::frozen),
            (Mutation::TurnWhileFrozen, super::image::grown),
        ];
        let found = weakenings.map(|(mutation, scene)| (mutation, found(mutation, 200, scene)));
        std::panic::set_hook(hook);
        for (mutation, seeds) in found {
            println!("weakening {mutation:?}: found within {:?} schedules", seeds.unwrap_or(0) * PER_SEED as u64);
            assert!(seeds.is_some(), "{mutation:?} was not found");
        }
    }
}
