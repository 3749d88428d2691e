// Follow topics from Go, with the standard library alone: resumes where it was,
// waits out what passes, and stops at what does not.
//
//	go run listen.go http://localhost:8080 orders      prints events; TOKEN=… is sent as a bearer
//
// As a library, copy Event and Listen. Written for Go 1.19 and later.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"time"
)

// Event is one event of a stream. Store the ID with what you made of it, and
// give it to Listen to go on behind it.
type Event struct{ Name, Data, ID string }

const (
	longestWait  = 30 * time.Second
	longestEvent = 4 << 20 // of one line; SSE_MAX_EVENT_BYTES is 1 MiB
)

// Listen calls handle for each event behind lastEventID, in order and once,
// over as many connections as it takes. "stream.reset" means that events were
// lost: fetch your state again. The kit's other "stream." events stay in here.
//
// It returns when ctx ends, when handle returns an error, when the server
// refuses for good, or with nil when there is no more to come (204).
func Listen(ctx context.Context, address, lastEventID string, header http.Header, handle func(Event) error) error {
	s := &stream{address: address, header: header, handle: handle, id: lastEventID, retry: time.Second, silence: 45 * time.Second}
	random := rand.New(rand.NewSource(time.Now().UnixNano()))
	for {
		s.after = 0
		if err := s.read(ctx); err != nil {
			var stop *stopped
			if errors.As(err, &stop) {
				return stop.err
			}
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		// Longer after each failure, never less than told, and spread.
		wait := s.retry << s.failures
		if wait > longestWait {
			wait = longestWait
		} else if s.failures < 10 {
			s.failures++
		}
		wait = longer(wait, longer(s.retry, s.after))
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait + time.Duration(random.Int63n(int64(wait)/2+1))):
		}
	}
}

type stream struct {
	address  string
	header   http.Header
	handle   func(Event) error
	id       string        // of the last complete event
	retry    time.Duration // as the server says
	after    time.Duration // the last answer's Retry-After
	silence  time.Duration // three heartbeats
	failures int
}

// stopped is an error that no repetition cures.
type stopped struct{ err error }

func (s *stopped) Error() string { return "stopped" }

// read makes one request and hands its events over, until it ends.
func (s *stream) read(parent context.Context) error {
	ctx, cancel := context.WithCancel(parent)
	defer cancel()
	// Whatever TCP says: who is silent for so long is gone.
	watch := time.AfterFunc(s.silence, cancel)
	defer watch.Stop()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, s.address, nil)
	if err != nil {
		return &stopped{err}
	}
	for name, values := range s.header {
		request.Header[name] = values
	}
	// More than a browser's EventSource asks for: so "later" comes with its true status.
	request.Header.Set("Accept", "text/event-stream, application/problem+json")
	request.Header.Set("Accept-Encoding", "identity")
	if s.id != "" {
		request.Header.Set("Last-Event-ID", s.id)
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if seconds, err := strconv.Atoi(answer.Header.Get("Retry-After")); err == nil && seconds < 86400 {
		s.after = time.Duration(seconds) * time.Second
	}
	switch code := answer.StatusCode; {
	case code == http.StatusNoContent:
		return &stopped{nil}
	case code == 408 || code == 425 || code == 429 || code >= 500:
		return fmt.Errorf("status %d", code)
	case code != http.StatusOK || !strings.HasPrefix(answer.Header.Get("Content-Type"), "text/event-stream"):
		problem, _ := io.ReadAll(io.LimitReader(answer.Body, 4096))
		return &stopped{fmt.Errorf("must be a stream, got status %d: %s", code, problem)}
	}

	lines := bufio.NewScanner(answer.Body)
	lines.Buffer(nil, longestEvent)
	lines.Split(lineSplitter())
	var name, data, id = "", []string(nil), s.id
	for first := true; lines.Scan(); first = false {
		watch.Reset(s.silence)
		line := lines.Text()
		if first {
			line = strings.TrimPrefix(line, "\ufeff")
		}
		if line == "" {
			s.id = id // only now: an event that was cut counts for nothing
			event := Event{name, strings.Join(data, "\n"), id}
			dispatch := data != nil
			name, data = "", nil
			if dispatch {
				if err := s.take(event); err != nil {
					return &stopped{err}
				}
			}
			continue
		}
		field, value, _ := strings.Cut(line, ":")
		value = strings.TrimPrefix(value, " ")
		switch field {
		case "event":
			name = value
		case "data":
			data = append(data, value)
		case "id":
			if !strings.Contains(value, "\x00") {
				id = value
			}
		case "retry":
			if ms, err := strconv.ParseUint(value, 10, 31); err == nil {
				s.retry = longer(50*time.Millisecond, time.Duration(ms)*time.Millisecond)
			}
		}
	}
	if errors.Is(lines.Err(), bufio.ErrTooLong) {
		return &stopped{fmt.Errorf("a line must fit into %d bytes", longestEvent)}
	}
	return lines.Err()
}

func (s *stream) take(event Event) error {
	s.failures = 0
	if event.Name == "" {
		event.Name = "message"
	}
	if event.Name == "stream.open" {
		var opened struct {
			Seconds float64 `json:"heartbeat_seconds"`
		}
		if json.Unmarshal([]byte(event.Data), &opened) == nil && opened.Seconds > 0 {
			s.silence = time.Duration(3 * opened.Seconds * float64(time.Second))
		}
	}
	if strings.HasPrefix(event.Name, "stream.") && event.Name != "stream.reset" {
		return nil
	}
	return s.handle(event)
}

// lineSplitter ends lines at CR, LF and CRLF, a CR at once:
// https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
func lineSplitter() bufio.SplitFunc {
	afterCR := false
	return func(data []byte, atEOF bool) (int, []byte, error) {
		skip := 0
		if afterCR && len(data) > 0 {
			afterCR = false
			if data[0] == '\n' {
				skip = 1
			}
		}
		end := bytes.IndexAny(data[skip:], "\r\n")
		if end < 0 {
			return skip, nil, nil // what no line end closes is dropped
		}
		afterCR = data[skip+end] == '\r'
		return skip + end + 1, data[skip : skip+end], nil
	}
}

func longer(a, b time.Duration) time.Duration {
	if a > b {
		return a
	}
	return b
}

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: go run listen.go URL TOPIC...")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	header := http.Header{}
	if token := os.Getenv("TOKEN"); token != "" {
		header.Set("Authorization", "Bearer "+token)
	}
	address := strings.TrimSuffix(os.Args[1], "/") + "/events?" + url.Values{"topic": os.Args[2:]}.Encode()
	err := Listen(ctx, address, os.Getenv("LAST_EVENT_ID"), header, func(event Event) error {
		fmt.Printf("%s %s %q\n", event.ID, event.Name, event.Data)
		return nil
	})
	if err != nil && ctx.Err() == nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
