# The reaper of a testbed. Its standard input is a pipe that the testbed's owner holds open:
#   watch PID    PID, the leader of a process group, was started
#   forget PID   PID has ended and was waited for
# The pipe closes when the owner drops the testbed or dies, however it dies. Then every watched group
# is killed, and every Postgres process of the folder, because each of those leads a group of its own.
# Arguments: the folder; `keep` or `remove`.
trap '' HUP INT QUIT TERM PIPE
folder=$1
afterwards=$2

watched=' '
while read -r verb pid; do
    case $verb in
        watch) watched="$watched$pid " ;;
        forget)
            case $watched in
                *" $pid "*) watched="${watched%%" $pid "*} ${watched#*" $pid "}" ;;
            esac
            ;;
    esac
done

for pid in $watched; do
    kill -s KILL -- "-$pid"
done

# Kills what is left of the Postgres servers, and tells whether there was any. A process of theirs is
# known by its name and its working folder.
kill_strays() {
    found=no
    for data in "$folder"/*/data; do
        [ -d "$data" ] || continue
        for process in /proc/[0-9]*; do
            [ "$process/cwd" -ef "$data" ] || continue
            read -r name <"$process/comm"
            [ "$name" = postgres ] || continue
            kill -s KILL "${process#/proc/}"
            found=yes
        done
    done
    [ "$found" = yes ]
}
turn=0
while kill_strays && [ "$turn" -lt 500 ]; do
    turn=$((turn + 1))
    sleep 0.02
done

# A killed Postgres leaves a small System V shared memory segment, whose id is on line 7 of this file.
for file in "$folder"/*/data/postmaster.pid; do
    [ -f "$file" ] || continue
    segment=$(sed -n 7p "$file")
    [ -n "$segment" ] && ipcrm -m "${segment##* }"
done

# A process that is just dying may still make a file: once more, then.
[ "$afterwards" = keep ] && exit
turn=0
while [ -e "$folder" ] && [ "$turn" -lt 500 ]; do
    [ "$turn" -gt 0 ] && sleep 0.02
    turn=$((turn + 1))
    rm -rf -- "$folder"
done
