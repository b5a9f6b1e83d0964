//! Requests whose tables are not in memory.

use anyhow::Result;
use bench_work::offsets::Offsets;
use bench_work::protocol::{Kind, Work};

use super::Bench;
use crate::contender::{Contender, Field};
use crate::figures::{Line, ratios};
use crate::place::{GIB, Resident, Shape, opening};

/// A disk of 1 TiB needs 128 MiB of L2 tables, more than anybody keeps in memory by default. Its data is one hole.
pub fn uncached(bench: &mut Bench) -> Result<Vec<Line>> {
    let (scale, place) = (bench.scale, &bench.tmpfs);
    let shape = Shape::mapped(scale.size(1024 * GIB), 64 << 10, Resident::Nothing);
    shape.make(place, "uncached", &Contender::ALL)?;
    let mut field = Field::open(&Contender::ALL, |who| Ok(opening(&place.of(who, "uncached"))))?;
    let units = shape.size >> 16;
    let count = scale.pick(500, 1_000);
    let samples = field.rounds(scale.rounds(), false, |round| {
        let offsets = Offsets::Random { units, unit: 64 << 10, within: 0, seed: round };
        Work::new(Kind::Read, 4096, offsets, count)
    })?;
    field.close()?;
    let work = format!("random 4 KiB read, 1 TiB, L2 tables not in memory, {}", place.name);
    Ok(vec![ratios("uncached", work, &samples).at_most(2.5)])
}
