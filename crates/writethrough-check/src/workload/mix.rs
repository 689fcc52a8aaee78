//! How often each kind of operation is invoked.

use std::fmt;
use std::str::FromStr;

use crate::history::Action;

/// How often each kind of operation is invoked, as weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mix {
    /// Weight of reads.
    pub read: u32,
    /// Weight of lists.
    pub list: u32,
    /// Weight of updates.
    pub update: u32,
    /// Weight of creates.
    pub create: u32,
    /// Weight of deletes.
    pub delete: u32,
}

impl Default for Mix {
    fn default() -> Self {
        Self {
            read: 60,
            list: 10,
            update: 22,
            create: 4,
            delete: 4,
        }
    }
}

impl Mix {
    fn weights(self) -> [(Action, u32); 5] {
        [
            (Action::Read, self.read),
            (Action::List, self.list),
            (Action::Update, self.update),
            (Action::Create, self.create),
            (Action::Delete, self.delete),
        ]
    }

    /// Chooses the next operation.
    pub(crate) fn pick(self, random: &mut fastrand::Rng) -> Action {
        let total: u32 = self.weights().iter().map(|(_, weight)| weight).sum();
        let mut at = random.u32(0..total.max(1));
        for (action, weight) in self.weights() {
            if at < weight {
                return action;
            }
            at -= weight;
        }
        Action::Read
    }
}

impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<String> = self
            .weights()
            .iter()
            .map(|(action, weight)| format!("{}={weight}", action.name()))
            .collect();
        f.write_str(&parts.join(","))
    }
}

impl FromStr for Mix {
    type Err = String;

    /// Parses `read=60,list=10,update=22,create=4,delete=4`; what is left out is never invoked.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut mix = Self {
            read: 0,
            list: 0,
            update: 0,
            create: 0,
            delete: 0,
        };
        for part in text.split(',') {
            let (name, weight) = part
                .split_once('=')
                .ok_or_else(|| format!("{part:?} is not NAME=WEIGHT"))?;
            let place = match name.trim() {
                "read" => &mut mix.read,
                "list" => &mut mix.list,
                "update" => &mut mix.update,
                "create" => &mut mix.create,
                "delete" => &mut mix.delete,
                _ => {
                    return Err(format!(
                        "{name:?} is none of read, list, update, create and delete"
                    ));
                }
            };
            *place = weight
                .trim()
                .parse()
                .ok()
                .filter(|weight| *weight <= 1_000_000)
                .ok_or_else(|| format!("{weight:?} is not a number from 0 to 1000000"))?;
        }
        if mix.weights().iter().all(|(_, weight)| *weight == 0) {
            return Err("all weights are 0".to_owned());
        }
        Ok(mix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mix_is_parsed_and_shown() {
        assert_eq!(
            "read=3, update=1".parse::<Mix>().unwrap().to_string(),
            "read=3,list=0,update=1,create=0,delete=0"
        );
        for wrong in ["", "read", "read=x", "reed=1", "read=0"] {
            assert!(wrong.parse::<Mix>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_mix_is_kept_to() {
        let mix: Mix = "read=3,delete=1".parse().unwrap();
        let mut random = fastrand::Rng::with_seed(1);
        let reads = (0..4_000)
            .filter(|_| mix.pick(&mut random) == Action::Read)
            .count();
        assert!((2_800..3_200).contains(&reads), "{reads}");
    }
}
