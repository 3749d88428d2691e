<?php
/*
 * Publish an event from PHP by one XADD, without an extension.
 *
 *   publish('127.0.0.1', 6379, ['orders'], json_encode(['id' => 7]), 'created');
 *
 * With phpredis: $redis->xAdd('{sse}:log', '*', ['v' => 1, 'topics' => 'orders', 'data' => '…']);
 */

function publish(string $host, int $port, array $topics, string $data, string $event = ''): string
{
    $words = ['XADD', '{sse}:log', '*', 'v', '1', 'topics', implode(' ', $topics), 'data', $data];
    if ($event !== '') {
        array_push($words, 'event', $event);
    }
    $socket = stream_socket_client("tcp://$host:$port", $code, $error, 5);
    if ($socket === false) {
        throw new RuntimeException("Redis must be reachable: $error");
    }
    stream_set_timeout($socket, 5);
    $command = '*' . count($words) . "\r\n";
    foreach ($words as $word) {
        $command .= '$' . strlen($word) . "\r\n$word\r\n";
    }
    fwrite($socket, $command);
    $first = fgets($socket);
    if ($first === false || $first[0] !== '$') {
        throw new RuntimeException('Redis must take the event, got ' . trim((string) $first));
    }
    $id = trim(fgets($socket));
    fclose($socket);
    return $id;
}

if (isset($argv[0]) && realpath($argv[0]) === __FILE__) {
    [, $host, $port, $topic, $data] = $argv;
    echo publish($host, (int) $port, [$topic], $data), "\n";
}
