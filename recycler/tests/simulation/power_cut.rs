//! Power cuts: histories on a device that forgets. Whenever something new is in doubt, and after every guest flush, the
//! images that a power cut would leave at that instant are made and looked at: all of them if few sectors are in doubt,
//! a telling sample otherwise. Each must be sound, hold what the model allows, and recover.
//!
//! `QCR_SEED=n cargo test --test simulation power_cut::` replays a seed, `QCR_SEQUENCE='discard,flush'` a sequence of
//! steps; `QCR_SOAK_MINUTES=n` makes the run longer.

use std::time::Instant;

use crate::common::crash::Effort;
use crate::common::cuts::{self, Budget, Counts};
use crate::common::directed;
use crate::common::guests::Failure;
use crate::common::history::{self, History};
use crate::common::slice::{self, Slice};

/// Reports a failure after shortening what led to it.
fn fail(seed: u64, history: History, first: Failure, play: impl Fn(&History) -> Result<(), Failure>) -> ! {
    println!("seed {seed} fails: {}; shortening it", first.message);
    let short = history::shrink(history, |h| play(h).is_err());
    let last = play(&short).err().unwrap_or(first);
    let History { config, rounds, .. } = short;
    panic!(
        "seed {seed}, {config}\nshortened to {rounds:#?}\n{last}\n\
         replay: QCR_SEED={seed} cargo test --test simulation random_histories"
    );
}

#[test]
fn random_histories() {
    let soak = slice::soak_minutes().is_some();
    let budget = Budget {
        moments: if soak { 120 } else { 40 },
        effort: Effort { exhaustive: if soak { 10 } else { 7 }, random: 24, singles: 8 },
        qemu: if soak { 400 } else { 150 },
        twice: 151,
    };
    let (mut counts, start) = (Counts::default(), Instant::now());
    for seed in Slice::new(30, 10, 0.5) {
        let (history, from) = match seed % 16 {
            // A large disk, so seldom.
            12 => cuts::outgrowing_history(seed),
            3 | 7 | 11 | 15 => cuts::racing_history(seed),
            2 | 10 => directed::any(seed),
            5 | 13 => cuts::reusing_history(seed),
            6 | 14 => cuts::overtaken_history(seed),
            _ => cuts::random_history(seed),
        };
        if let Err(failure) = cuts::play(&history, &from, budget, &mut counts) {
            fail(seed, history, failure, |h| cuts::play(h, &from, budget, &mut Counts::default()));
        }
    }
    println!("power cuts, random histories: {counts}, in {:?}", start.elapsed());
    counts.tell();
}

/// Sequences of up to three steps on one kind of image each.
mod sequences {
    use crate::common::chain::Behind;
    use crate::common::cuts::Made;
    use crate::common::encryption::Encryption;
    use crate::common::sequences::{PLAIN, Variant};

    /// What each kind gets of a soak.
    const SHARE: f64 = 0.5 / 26.0;

    macro_rules! on {
        ($name:ident, $threes:expr, $variant:expr) => {
            #[test]
            fn $name() {
                let name = stringify!($name);
                Variant { name, ..$variant }.sequences($threes, SHARE);
            }
        };
    }

    on!(plain, 200, PLAIN);
    on!(lazy_refcounts, 20, Variant { lazy_refcounts: true, ..PLAIN });
    // The cache holds seven slices at least.
    on!(cache_that_evicts, 20, Variant { sectors: 700, l2_cache_size: 0, ..PLAIN });
    on!(partial_clusters_counted_by_bits, 20, Variant { cluster_bits: 10, refcount_bits: 1, ..PLAIN });
    on!(larger_clusters, 20, Variant { cluster_bits: 12, refcount_bits: 32, ..PLAIN });
    on!(snapshot, 60, Variant { made: Made::WithSnapshot, ..PLAIN });
    on!(
        snapshot_partial_clusters,
        20,
        Variant { cluster_bits: 10, refcount_bits: 8, made: Made::WithSnapshot, ..PLAIN }
    );
    on!(compressed, 40, Variant { cluster_bits: 11, sectors: 96, made: Made::Compressed, ..PLAIN });
    on!(compressed_by_zstd, 20, Variant { cluster_bits: 11, sectors: 96, made: Made::Compressed, zstd: true, ..PLAIN });
    // A subcluster is a sector.
    on!(subclusters, 20, Variant { cluster_bits: 14, extended_l2: true, sectors: 130, ..PLAIN });
    on!(
        subclusters_snapshot,
        10,
        Variant { cluster_bits: 14, extended_l2: true, sectors: 130, made: Made::WithSnapshot, ..PLAIN }
    );
    on!(encrypted, 20, Variant { cluster_bits: 10, encryption: Encryption::Aes, ..PLAIN });
    on!(encrypted_by_place, 40, Variant { cluster_bits: 10, encryption: Encryption::Luks, ..PLAIN });
    on!(
        encrypted_subclusters,
        10,
        Variant { cluster_bits: 14, extended_l2: true, sectors: 130, encryption: Encryption::Luks, ..PLAIN }
    );
    on!(version_2, 20, Variant { version: 2, ..PLAIN });
    // Every growth of the file needs new refcount blocks.
    on!(many_refcount_blocks, 40, Variant { refcount_bits: 64, ..PLAIN });
    on!(device_of_fixed_length, 20, Variant { room: 512, ..PLAIN });
    on!(over_a_raw_file, 40, Variant { cluster_bits: 11, backing: Behind::Raw(70), ..PLAIN });
    on!(over_a_shorter_file, 20, Variant { cluster_bits: 10, backing: Behind::Raw(39), ..PLAIN });
    on!(over_a_longer_image, 20, Variant { cluster_bits: 11, backing: Behind::Image(101), ..PLAIN });
    on!(over_two, 20, Variant { backing: Behind::Two(70), ..PLAIN });
    on!(
        over_two_snapshot,
        20,
        Variant { cluster_bits: 10, backing: Behind::Two(70), made: Made::WithSnapshot, ..PLAIN }
    );
    on!(
        over_a_file_compressed,
        10,
        Variant { cluster_bits: 11, sectors: 96, backing: Behind::Raw(90), made: Made::Compressed, ..PLAIN }
    );
    on!(
        over_an_image_subclusters,
        10,
        Variant { cluster_bits: 14, extended_l2: true, sectors: 130, backing: Behind::Image(120), ..PLAIN }
    );
    on!(over_an_image_version_2, 10, Variant { cluster_bits: 10, version: 2, backing: Behind::Image(70), ..PLAIN });
    on!(
        over_a_file_encrypted,
        10,
        Variant { cluster_bits: 11, backing: Behind::Raw(70), encryption: Encryption::Aes, ..PLAIN }
    );
}
